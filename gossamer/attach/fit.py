"""What cannot be held is refused before any mask is attached."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core.errors import PatternError
from ..core.pattern import Pattern
from ..core.regroup import tied_rows
from ..core.sparsifier import Sparsifier, require_finite
from .targets import Target
from .twoway import refuse_one_way


def refuse_misfits(model: nn.Module, sparsifier: Sparsifier, targets: Sequence[Target]) -> None:
    """Raise unless every layer can be held.

    Raises:
        NonFiniteError: a weight holds NaN or infinity.
        TargetError: the sparsifier wants a layer's backward pass changed, and it cannot be.
        PatternError: a pattern does not fit; the message says why for the first layer, and names all of them.
    """
    misfits = {}
    for t in targets:
        require_finite(t.weight(model), f"the weight of layer {t.name!r}")
        if sparsifier.backward is not None:
            refuse_one_way(model, t)
        try:
            _place(model, sparsifier, t)
        except PatternError as error:
            misfits[t.name] = error
    if misfits:
        name, error = next(iter(misfits.items()))
        raise PatternError(f"layer {name!r}: {error} (to leave dense what does not fit: skip={list(misfits)})")


def _place(model: nn.Module, sparsifier: Sparsifier, target: Target) -> None:
    outputs, *rest = target.weight(model).shape
    (tied_rows if sparsifier.regroup else Pattern.place)(sparsifier.pattern, (outputs, *rest))
    if sparsifier.backward is not None:  # the gradient by the inputs adds up over the outputs of one group
        sparsifier.backward.place((outputs // getattr(target.module(model), "groups", 1), *rest))
