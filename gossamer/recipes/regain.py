"""regain: how many epochs of training a pruned network needs until it is as good as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..attach.handle import Handle
from ..attach.targets import Target, find
from ..attach.weights import hold
from ..core.errors import BudgetError, TargetError
from ..core.sparsifier import Sparsifier
from .cycles import choose_within, copied, rules

Epochs = Callable[[nn.Module, Handle], Iterator[object]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Regained:
    """One density.

    Args:
        density: fraction kept of the targets.
        kept: the same as a count.
        pruned: the score before any training.
        curve: the score after each epoch.
        epochs: until the score was as good as asked for; 0 where nothing was lost, None where it was not reached.
    """

    density: float
    kept: int
    pruned: float
    curve: tuple[float, ...]
    epochs: int | None


@dataclass(frozen=True)
class Recovery:
    """dense: the score before pruning; rows: one per density."""

    dense: float
    rows: tuple[Regained, ...]


def regain(
    model: nn.Module,
    train: Epochs,
    measure: Callable[[nn.Module], float],
    *,
    densities: Sequence[float],
    most: int = 10,
    tolerance: float = 0.0,
    higher_is_better: bool = True,
    method: str = "global_magnitude",
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
    progress: Progress | None = None,
) -> Recovery:
    """Prune a trained model to each density, train on, and count the epochs until its score is back.

    Every density starts from the trained model, which is as it was in the end. Pruned weights stay zero.

    Args:
        train: `train(model, handle)` is a generator: it trains one epoch for each value that it yields and calls
            `handle.step()` after every optimizer step. It builds its own optimizer.
        measure: model → the score.
        densities: fractions kept, each between 0 and 1.
        most: epochs after which a density is given up.
        tolerance: how far from the dense score counts as back. Unit: of the score.
        higher_is_better: False for errors and perplexity.
        method: "global_magnitude" (one threshold over all targets, as the paper has it) or "magnitude" (each its own).
        targets, skip: weights, as for `gossamer.attach`: "*weight_hh*" prunes hidden-to-hidden weights alone.
        progress: called with (density in words, done, total).

    Example:
        >>> report = regain(model, train, accuracy, densities=(0.4, 0.2), targets=["rnn"])  # doctest: +SKIP
        >>> [(r.density, r.epochs) for r in report.rows]  # doctest: +SKIP

    Raises:
        BudgetError: a density is not between 0 and 1, most is below 1, or tolerance below 0.
        UnknownName: no such method.
        TargetError: no target, a method that goes by more than the weights, or train() is no generator, ended before
            the score was back, or never called handle.step().

    Reference: Darji, Investigating Sparsity in Recurrent Neural Networks, arXiv:2407.20601.
    """
    if most < 1 or tolerance < 0 or not densities:
        raise BudgetError(
            f"give densities, most= of 1 or more and tolerance= of 0 or more, got {densities}, {most}, {tolerance:g}"
        )
    if bad := [d for d in densities if not 0.0 < d < 1.0]:
        raise BudgetError(f"a density is the fraction KEPT, between 0 and 1, got {bad[0]:g}")
    found = find(model, tuple(targets), tuple(skip)).targets
    sparsifiers = rules(model, found, method, densities)
    start, dense = copied(model), measure(model)
    worst = dense - tolerance if higher_is_better else dense + tolerance
    back = lambda score: score >= worst if higher_is_better else score <= worst
    rows = []
    for density, sparsifier in zip(densities, sparsifiers):
        try:
            rows.append(_one(model, found, sparsifier, train, measure, back, most))
        finally:
            model.load_state_dict(start)
        if progress is not None:
            progress(f"density {density:g}", len(rows), len(densities))
    return Recovery(dense, tuple(rows))


def _one(
    model: nn.Module,
    found: Sequence[Target],
    sparsifier: Sparsifier,
    train: Epochs,
    measure: Callable[[nn.Module], float],
    back: Callable[[float], bool],
    most: int,
) -> Regained:
    handle = hold(model, supports=choose_within(model, found, sparsifier))
    try:
        kept, pruned = sum(s.count for s in handle.supports().values()), measure(model)
        curve = [] if back(pruned) else _curve(model, handle, train, measure, back, most)
    finally:
        handle.remove()
    epochs = len(curve) if back([pruned, *curve][-1]) else None
    return Regained(kept / sum(t.weight(model).numel() for t in found), kept, pruned, tuple(curve), epochs)


def _curve(
    model: nn.Module,
    handle: Handle,
    train: Epochs,
    measure: Callable[[nn.Module], float],
    back: Callable[[float], bool],
    most: int,
) -> list[float]:
    curve: list[float] = []
    run = train(model, handle)
    if not isinstance(run, Iterator):
        raise TargetError("train() must be a generator: train one epoch, `yield`, and so on")
    for _ in run:
        if not handle.steps:
            raise TargetError("train() called handle.step() not once; call it after every optimizer.step()")
        curve.append(measure(model))
        if back(curve[-1]) or len(curve) == most:
            return curve
    raise TargetError(
        f"train() ended after {len(curve)} epochs, before the score was back; let it go on to most={most}"
    )
