"""G2GNet: groups of neurons, dense within and sparse between, whose links move to where activity goes together."""

from __future__ import annotations

from gossamer.core import Density, DropGrow, OneShot, Pattern, Schedule, Sparsifier, Stats, method
from gossamer.core.dropgrow import Worth, one_of
from gossamer.core.errors import BudgetError
from gossamer.core.policy import within_run
from gossamer.score import Groups, magnitude
from gossamer.score import random as by_lot

BETWEEN = 0.15  # of the links between groups, where no density is given: the default of the spiking sibling's code


def _together(_: object, stats: Stats):
    return stats["correlation"].abs()


@method("g2gnet", paper="arXiv:2508.14140", row="P092")
def g2gnet(
    *,
    density: float | None = None,
    total_steps: int,
    groups: int = 8,
    grouping: str = "index",
    drop: str = "magnitude",
    grow: str = "hebb",
    fraction: float | Schedule = 0.1,
    every: int = 1000,
    until: int | None = None,
    seed: int = 0,
) -> Sparsifier:
    """Start dense within G groups, at random between them; drop ζ of the links, grow where |corr(x, y)| is largest.

    Neurons on both sides of a layer are in G groups. With p links kept of those between groups, d = 1/G + p·(1 − 1/G):
    p = 0.15 and G = 8 keep 25.6 %. Every ΔT steps the ζ·nnz links with the smallest |w| go, and as many come, starting
    from 0, where the layer's input and output were correlated most in this step's batches (Hebb: what fires together,
    wires together).

    Args:
        density: d; a density below 1/G leaves gaps within groups. 1/G + 0.15·(1 − 1/G) unless given.
        total_steps: length of the run. Unit: optimizer steps.
        groups: G, at least 1. A layer with fewer inputs or outputs has as many groups as it has of those.
        grouping: "index" (neighbours), "random", "interleaved" (every G-th), or "mixer" (neighbours and every G-th, in
            turn from layer to layer).
        drop: "magnitude", "random", or "hebb": the smallest |corr|.
        grow: "hebb" or "random".
        fraction: ζ, in [0, 1], or a schedule of it.
        every: ΔT, steps between moves; 0 = links never move. Unit: optimizer steps.
        until: last step that may move links; the run's end unless given. Unit: optimizer steps.
        seed: of the start and of all lots.

    Raises:
        BudgetError: fewer than one group, a fraction out of range, an unknown drop or grow, or a schedule that does not
            fit into the run.
        UnknownName: no such grouping.

    Example:
        >>> rule = g2gnet(total_steps=3000)
        >>> rule.final_density(), [t for t in range(3001) if rule.policy.due(t)]
        (0.25625, [0, 1000, 2000, 3000])

    Reference: Konstantaropoulos, Smyrnakis and Papadopouli, Neuro-inspired Ensemble-to-Ensemble Communication
        Primitives for Sparse and Efficient ANNs, arXiv:2508.14140.
    Departs from: only the paper's abstract was read; groups, 0.15, ζ, ΔT and the rule are those of a spiking sibling's
        code by other hands. There links between groups are drawn one by one, so counts drift; sizes must be multiples
        of G; spikes, never negative, are compared by their cosine, here inputs and outputs before the non-linearity by
        |correlation|, a convolution's over all pixels; and weights of sparse rows start larger.
    """
    if groups < 1:
        raise BudgetError(f"neurons are in 1, 2, ... groups, got groups={groups}")
    one_of(grow, ("hebb", "random"), "for other ways see 'set' and 'rigl'")
    one_of(drop, ("hebb", "magnitude", "random"), "this is what drop= takes")
    until = total_steps if until is None else within_run(until, total_steps)
    dropped_by: dict[str, Worth] = {"hebb": _together, "magnitude": magnitude, "random": by_lot(seed)}
    moves = every != 0 and DropGrow(
        drop=dropped_by[drop],
        grow=_together if grow == "hebb" else "random",
        fraction=fraction,
        until=until,
        every=every,
        seed=seed,
        needs=("correlation",) if "hebb" in (drop, grow) else (),
    )
    return Sparsifier(
        score=Groups(groups, by=grouping, seed=seed),
        pattern=Pattern("[...]"),
        budget=Density((1.0 + BETWEEN * (groups - 1)) / groups if density is None else density),
        policy=moves or OneShot(),
        name="g2gnet",
    )
