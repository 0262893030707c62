"""Export: a dense model as an ONNX file at one example's shapes, for the engines that read it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError, GossamerError, need
from .examples import Example, tensors
from .layers import packed_layers
from .sparse_onnx import leave_out_zeros
from .unpack import unpack


def named_inputs(example: Example) -> dict[str, Tensor]:
    """An example's tensors by the name they get in an exported file.

    Raises:
        CalibrationError: it holds something that is not a tensor.
    """
    if isinstance(example, Mapping):
        found = dict(example)
    else:
        found = {f"input_{i}": x for i, x in enumerate(example if isinstance(example, tuple) else (example,))}
    odd = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise CalibrationError(f"engines take tensors only, but {odd[0]!r} is a {type(found[odd[0]]).__name__}")
    return found


class _Flat(nn.Module):
    """A model called with positional tensors, giving back its floating-point outputs as a tuple."""

    def __init__(self, model: nn.Module, keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.keywords = model, keywords

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.keywords, args))) if self.keywords else self.model(*args)
        return tuple(tensors(out))


def export_onnx(model: nn.Module, example: Example, file: str | Path, *, sparse: bool = False) -> Path:
    """Write a model as ONNX with the example's own shapes, which is what engines optimise best for.

    Pruned weights keep their zeros; packed layers are written as the dense ones they came from, as ONNX has no product
    with sparse weights.

    Args:
        sparse: write weights that become smaller so as sparse initializers: kept values and a 64-bit place for each,
            which pays under a density of 1/3 in float32. onnxruntime reads them, and unpacks them as it loads.

    Raises:
        MissingDependency: onnx or onnxscript is not installed.
        GossamerError: neither of torch's exporters can export this model; both reasons are given.
    """
    need("onnx", "demo")
    need("onnxscript", "demo")
    inputs = named_inputs(example)
    model = unpack(model) if packed_layers(model) else model
    flat = _Flat(model, tuple(inputs) if isinstance(example, Mapping) else ()).eval()
    reasons = []
    for name, options in (("new", {"dynamo": True, "verbose": False}), ("old", {"dynamo": False, "opset_version": 18})):
        try:
            with _quiet(), torch.no_grad():
                torch.onnx.export(flat, tuple(inputs.values()), str(file), input_names=list(inputs), **options)
            break
        except Exception as error:  # exporters run a compiler over foreign code and may fail in any way
            first = (str(error).splitlines() or [""])[0]
            reasons.append(f"{name} exporter: {type(error).__name__}: {first}")
    else:
        raise GossamerError(f"{type(model).__name__} cannot be exported to ONNX; " + "; ".join(reasons))
    if sparse:
        leave_out_zeros(file)
    return Path(file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print their steps and warn about libraries that are not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
