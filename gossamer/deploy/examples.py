"""Examples: what a model is run on to learn shapes, to time it, and to compare what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError

# One call: a mapping is passed as keywords, a tuple as arguments, a tensor by itself. A list holds several calls.
Example = Mapping[str, object] | tuple[object, ...] | Tensor

# Largest difference that counts as equal, relative to the largest value: room for another order of summing.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def as_list(example: Example | Sequence[Example]) -> list[Example]:
    """The examples as a list: a list is many, anything else is one.

    Raises:
        CalibrationError: there is none, or it is not something a model can be called with.
    """
    examples = list(example) if isinstance(example, list) else [example]
    if not examples or not all(isinstance(e, (Mapping, tuple, Tensor)) for e in examples):
        kinds = ", ".join(sorted({type(e).__name__ for e in examples})) or "an empty list"
        raise CalibrationError(
            f"an example is a mapping (keywords), a tuple (arguments) or a tensor, or a list of those; got {kinds}"
        )
    return examples


def call(model: nn.Module, example: Example) -> object:
    """Run the model on one example, without gradients."""
    with torch.no_grad():
        if isinstance(example, Mapping):
            return model(**example)
        return model(*example) if isinstance(example, tuple) else model(example)


def tensors(output: object) -> Iterator[Tensor]:
    """Every floating-point tensor of a model's output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors(value)


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest wanted value; infinite where shapes, NaNs or infinities disagree."""
    if [g.shape for g in got] != [w.shape for w in want]:
        return float("inf")
    return max((_one(g, w) for g, w in zip(got, want)), default=0.0)


def _one(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    finite = want.isfinite()
    if not bool(((got == want) | (got.isnan() & want.isnan()))[~finite].all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    got, want = got.detach()[finite].double(), want.detach()[finite].double()
    worst = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
    return worst if worst == worst else float("inf")


def close(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """True when both agree within the tolerance of the coarsest dtype."""
    allowed = max((TOLERANCE.get(w.dtype, 0.0) for w in want), default=0.0)
    return difference(got, want) <= allowed
