"""attach: a sparsifier takes hold of a model's weights for as long as it trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from ..core.budget import Above, Density
from ..core.dropgrow import DropGrow
from ..core.errors import BudgetError, TargetError, unknown
from ..core.pattern import Pattern
from ..core.policy import OneShot
from ..core.registry import get_method
from ..core.shrink import Attenuate, StraightThrough, hard
from ..core.sparsifier import Sparsifier
from ..core.support import Support
from ..score.trial import Loss, Trial
from .attenuating import AttenuatingHandle
from .exploring import ExploringHandle
from .fit import part_in_steps
from .handle import Handle
from .masked import Masked
from .searching import SearchingHandle
from .sharded import is_sharded
from .spread import spread, tries_out
from .start import first_supports
from .targets import Target, find, refuse_foreign

__all__ = ["Handle", "Masked", "attach", "hold"]


def attach(
    model: nn.Module,
    method: str | Sparsifier,
    *,
    density: float | None = None,
    sparsity: float | None = None,
    allocation: str | Mapping[str, float] | None = None,
    optimizer: torch.optim.Optimizer | Literal["later"] | None = None,
    total_steps: int | None = None,
    data: object = None,
    loss: Loss | None = None,
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
    regroup: bool = False,
    backend: Literal["masked", "sparse"] = "masked",
    **options: object,
) -> Handle:
    """Make a model's weights sparse while it trains: one line here, and `handle.step()` after `optimizer.step()`.

    Args:
        method: a registered name with its `options`, or a Sparsifier.
        density: fraction kept, above 0 and up to 1; the method's own default unless given.
        sparsity: the same said the other way, 1 − density; give one of the two.
        allocation: how the density is spread over layers: "uniform", "er", "erk", a method in which layers compete
            ("snip": its densities, not its choice), or a density per layer name; the method's own unless given. The
            model's count is exact.
        optimizer: its slots (momenta) are held at zero with the weights. Supports that move need it. With masks it may
            be built before or after attaching: parameters are found by name, and parametrize keeps the same Parameter
            object. backend="sparse" needs it too: its layers have new parameters, which take the old ones' place in it.
            "later" = it will be built from the attached model and given to `handle.follow`, for FSDP2, which is applied
            after attaching and makes new parameters.
        total_steps: length of the run, for methods with a schedule; others have no use for it. Unit: optimizer steps.
        data: for methods that try the model out first (SNIP, say): a batch (inputs, target), a mapping that the model
            takes by name, or several such batches; all are used. Others have no use for it.
        loss: (output, target) → scalar, such as cross_entropy; a mapping is its own target. None: the model returns it.
        targets: glob patterns of layers, "re:" for regular expressions; empty = all but the output head.
        skip: layers to leave alone.
        regroup: let patterns that tie rows choose which rows they tie, anew with each support.
        backend: "masked" = dense weights behind masks; "sparse" = each layer becomes a `nn.SparseLinear` that stores
            and trains kept weights only, for linear layers with 95 % zeros and more.

    Example:
        >>> handle = attach(model, "rigl", density=0.1, optimizer=opt, total_steps=1000)  # doctest: +SKIP

    Raises:
        UnknownName: no such method, option or allocation.
        BudgetError: the density is not above 0 and up to 1, or a schedule does not fit into the run.
        TargetError: a pattern matches nothing, a layer is held already, the optimizer does not own the weights, or the
            method needs what is missing (the length of the run, an optimizer, calibration statistics: use `prune`).
        CalibrationError: the method needs data and there are none, or the model or the loss fails on them.
        PatternError: a layer's shape is no multiple of the pattern's groups; pad it, or skip= the layer.
    """
    asked = {"density": _density(density, sparsity), "total_steps": total_steps, **options}
    sparsifier = _build(method, {k: v for k, v in asked.items() if v is not None})
    sparsifier = replace(sparsifier, regroup=True) if regroup else sparsifier
    _refuse_what_training_lacks(sparsifier, optimizer)
    found = find(model, tuple(targets), tuple(skip)).targets
    _refuse_sharded(model, found)
    built = None if optimizer == "later" else optimizer
    if built is not None:
        refuse_foreign(built, {t.name: t.stored(model) for t in found})
    chosen = _handle(backend, model, found, sparsifier, optimizer)
    allocation = _own_allocation(sparsifier) if allocation is None else allocation
    trial = Trial.of(data, loss) if data is not None and tries_out(sparsifier, allocation) else None
    per_layer = spread(model, found, sparsifier, allocation, trial)
    start = first_supports(model, found, sparsifier, per_layer, trial) if sparsifier.probe else None
    return chosen(model, sparsifier, found, built, per_layer=per_layer, start=start)


def _handle(
    backend: str, model: nn.Module, targets: Sequence[Target], sparsifier: Sparsifier, optimizer: object
) -> type[Handle]:
    if backend == "masked" and isinstance(sparsifier.shrink, Attenuate):
        return AttenuatingHandle
    if backend == "masked":
        return ExploringHandle if sparsifier.explore else SearchingHandle if sparsifier.search else Handle
    if backend != "sparse":
        raise unknown("backend", backend, ("masked", "sparse"))
    from .sparse import SparseHandle, refuse_what_is_not_linear

    refuse_what_is_not_linear(model, targets, sparsifier, optimizer)
    return SparseHandle


def _density(density: float | None, sparsity: float | None) -> float | None:
    if density is not None and sparsity is not None:
        raise BudgetError(f"density={density} and sparsity={sparsity} say the same thing; give one of the two")
    density = 1.0 - sparsity if sparsity is not None else density
    if density is not None and not 0.0 < density <= 1.0:
        raise BudgetError(
            f"density is the fraction KEPT, above 0 and up to 1, got {density:g}; for 80 % zeros write density=0.2"
        )
    return density


def _build(method: str | Sparsifier, asked: Mapping[str, object]) -> Sparsifier:
    """The sparsifier, from what was asked for; `total_steps` goes to methods that have it."""
    if not isinstance(method, str):
        if extra := [name for name in asked if name != "total_steps"]:
            raise TargetError(
                f"a Sparsifier has its options already; {', '.join(extra)} would be ignored, leave them out"
            )
        return method
    found = get_method(method)
    own = inspect.signature(found.build).parameters
    if "total_steps" in own and own["total_steps"].default is inspect.Parameter.empty and "total_steps" not in asked:
        raise TargetError(f"method {method!r} follows a schedule; pass total_steps= (optimizer steps of the run)")
    return found(**{k: v for k, v in asked.items() if k in own or k != "total_steps"})


def _own_allocation(sparsifier: Sparsifier) -> str:
    """The method's; what cannot be spread (one pool over the model, N:M) stays as it is."""
    free = sparsifier.scope == "layer" and isinstance(sparsifier.budget, Density)
    return sparsifier.allocation if free else "uniform"


def _refuse_what_training_lacks(sparsifier: Sparsifier, optimizer: torch.optim.Optimizer | str | None) -> None:
    shrink = sparsifier.shrink
    if shrink is not hard and not isinstance(shrink, StraightThrough | Attenuate):
        raise TargetError(
            f"attach keeps values hard, lets gradients straight through or shrinks by a share, but {sparsifier.name!r} "
            f"asks for {shrink}; "
            "parametrize with that rule yourself, or use shrink=hard"
        )
    if optimizer is None and (part := part_in_steps(sparsifier)):
        raise TargetError(f"method {sparsifier.name!r} {part}; pass optimizer=")
    if sparsifier.explore and sparsifier.explore.density < sparsifier.final_density():
        raise BudgetError(
            f"the gradient reaches all that is kept and more, but explore has density {sparsifier.explore.density:g} "
            f"where {sparsifier.final_density():g} are kept; give it as much or more"
        )
    if sparsifier.probe and not isinstance(sparsifier.policy, (OneShot, DropGrow)):
        raise TargetError(f"method {sparsifier.name!r} tries the model out before training, so it cannot choose later")
    if sparsifier.solve and not sparsifier.needs:
        raise TargetError(
            f"method {sparsifier.name!r} chooses its support once; call gossamer.prune, then gossamer.attach.hold"
        )
    if (sparsifier.needs and not sparsifier.probe) or sparsifier.solve:
        raise TargetError(
            f"method {sparsifier.name!r} needs calibration data; use gossamer.prune(model, ..., data=...)"
        )


def _refuse_sharded(model: nn.Module, targets: Sequence[Target]) -> None:
    for t in targets:
        if is_sharded(t.stored(model)):
            raise TargetError(
                f"layer {t.name!r} is sharded already; attach before fully_shard, with optimizer='later', and call "
                "handle.follow(optimizer) once the optimizer is built"
            )


def hold(
    model: nn.Module,
    *,
    supports: Mapping[str, Support] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    skip: Iterable[str] = (),
) -> Handle:
    """Train a pruned model on without filling its zeros: the supports are the weights that are not 0 now, or are given.

    Without supports, layers that have no zeros are left alone, so that no mask is paid for where nothing is sparse.

    Args:
        supports: of each layer by name, in the layout its weight is stored in, such as `handle.supports()` gave.

    Raises:
        TargetError: no weight of the model has a zero (prune it first), or a support is not a layer's.
    """
    if supports is not None:
        everything = Sparsifier(lambda w, _: w.abs(), Pattern("[...]"), Density(1.0), name="hold")
        handle = Handle(model, everything, find(model, tuple(supports), tuple(skip)).targets, optimizer)
        handle.take(supports)
        return handle
    found = find(model, ("*",), tuple(skip)).targets
    targets = [t for t in found if bool((t.weight(model) == 0).any())]
    if not targets:
        raise TargetError("no prunable weight has a zero, so there is no support to hold; call gossamer.prune first")
    zeros_stay = Sparsifier(lambda w, _: w.abs(), Pattern("[...]"), Above(0.0), name="hold")
    return Handle(model, zeros_stay, targets, optimizer)
