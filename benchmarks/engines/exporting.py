"""Networks to the files that engines read."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.deploy.export import export_onnx, named_inputs

Example = Tensor | Mapping[str, Tensor]


def export_network(network: nn.Module, example: Example, folder: Path) -> None:
    """Write inputs.npz, model.onnx and model-old.onnx at exactly these shapes."""
    np.savez(folder / "inputs.npz", **{name: x.numpy() for name, x in named_inputs(example).items()})
    export_onnx(network, example, folder / "model.onnx")
    export_old(network, example, folder / "model-old.onnx")


def export_old(network: nn.Module, example: Example, file: Path) -> None:
    """Opset 14 in a file version that engines of 2023 read; batch norms folded by the exporter."""
    import onnx

    names = tuple(named_inputs(example))
    with _silence(), torch.no_grad():
        torch.onnx.export(
            _first_output(network, names if isinstance(example, Mapping) else ()),
            tuple(named_inputs(example).values()),
            str(file),
            input_names=list(names),
            output_names=["output"],
            opset_version=14,
            dynamo=False,
        )
    model = onnx.load(str(file))
    model.ir_version = 8
    onnx.save(model, str(file))


@contextlib.contextmanager
def _silence():
    """The exporter says much that is of no use here."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _first_output(network: nn.Module, keywords: tuple[str, ...]) -> nn.Module:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *args: Tensor) -> Tensor:
            out = self.network(**dict(zip(keywords, args))) if keywords else self.network(*args)
            return out if isinstance(out, Tensor) else out[0]

    return Flat().eval()
