"""What does not fit is refused before anything changes: layers, supports, states, a method without its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..core.dropgrow import DropGrow
from ..core.errors import FileDamaged, PatternError, TargetError, near
from ..core.pattern import Pattern
from ..core.regroup import tied_rows
from ..core.search import refuse_pools
from ..core.shrink import StraightThrough
from ..core.sparsifier import Sparsifier, require_finite
from ..core.support import Support
from .statistics import without_statistics
from .targets import Target
from .twoway import refuse_one_way


def refuse_misfits(model: nn.Module, sparsifier: Sparsifier, targets: Sequence[Target]) -> None:
    """Raise unless every layer can be held.

    Raises:
        NonFiniteError: a weight holds NaN or infinity.
        TargetError: the sparsifier wants a layer's backward pass changed, or its columns seen, and neither can be.
        PatternError: a pattern does not fit; the message says why for the first layer, and names all of them.
    """
    misfits = {}
    for t in targets:
        require_finite(t.weight(model), f"the weight of layer {t.name!r}")
        if sparsifier.backward is not None:
            refuse_one_way(model, t)
        if isinstance(sparsifier.policy, DropGrow) and "correlation" in sparsifier.policy.evidence:
            _refuse_unseen(model, t)
        try:
            _place(model, sparsifier, t)
        except PatternError as error:
            misfits[t.name] = error
    if misfits:
        name, error = next(iter(misfits.items()))
        raise PatternError(f"layer {name!r}: {error} (to leave dense what does not fit: skip={list(misfits)})")


def part_in_steps(sparsifier: Sparsifier) -> str | None:
    """What a method does in its optimizer's steps, in words; None where it can do without an optimizer."""
    if isinstance(sparsifier.shrink, StraightThrough) and sparsifier.shrink.pull:
        return "draws pruned weights to 0 within the optimizer's step"
    if sparsifier.explore:
        return "adds to the gradients of its optimizer's step"
    if sparsifier.search:
        return "has its optimizer train scores in place of the weights"
    if isinstance(sparsifier.policy, DropGrow):
        return "moves links, and new ones must start with empty momenta"
    return None


def refuse_other_supports(supports: Mapping[str, Support], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise unless every support is that of a layer, in the shape its mask is stored in.

    Raises:
        TargetError: a name is not that of a layer held, or a support has another shape than its weight.
    """
    for name, support in supports.items():
        if name not in shapes:
            raise TargetError(f"no layer {name!r} is held here; {near(name, shapes)}")
        if tuple(support.shape) != tuple(shapes[name]):
            raise TargetError(
                f"the support of layer {name!r} is {tuple(support.shape)}, its weight {tuple(shapes[name])}; "
                "give it in the layout the weight is stored in"
            )


def refuse_other_state(state: Mapping[str, object], sparsifier: Sparsifier, backend: str) -> None:
    """Raise unless a state is that of a handle with this method and backend.

    Raises:
        FileDamaged: the state is not a handle's, or another method's or backend's.
    """
    missing = {"method", "steps", "waiting", "grown", "moved", "positions", "spent"} - set(state)
    if missing:
        raise FileDamaged(
            f"a handle's state holds {sorted(missing)}, got {sorted(state)}; pass what state_dict() returned"
        )
    if state["method"] != sparsifier.name:
        raise FileDamaged(
            f"this state is of method {state['method']!r}, the handle's is {sparsifier.name!r}; attach it"
        )
    if state.get("backend", backend) != backend:
        raise FileDamaged(
            f"this state is of backend={state['backend']!r}, the handle has backend={backend!r}, which stores weights "
            "another way; attach with the former"
        )


def _refuse_unseen(model: nn.Module, target: Target) -> None:
    if reason := without_statistics(target.module(model)):
        raise TargetError(f"links of layer {target.name!r} cannot move by correlation: {reason}; skip= it")


def _place(model: nn.Module, sparsifier: Sparsifier, target: Target) -> None:
    outputs, *rest = target.weight(model).shape
    (tied_rows if sparsifier.regroup else Pattern.place)(sparsifier.pattern, (outputs, *rest))
    if sparsifier.search is not None:
        refuse_pools(sparsifier.pattern, (outputs, *rest))
    if sparsifier.backward is not None:  # the gradient by the inputs adds up over the outputs of one group
        sparsifier.backward.place((outputs // getattr(target.module(model), "groups", 1), *rest))
