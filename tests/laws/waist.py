"""The laws of the waist, as functions of one case: `test_waist.py` feeds them, `test_mutants.py` breaks the code."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from gossamer.core import Density, Keep, Pattern, Support, allocation, erk, pattern, select
from gossamer.core.budget import count
from gossamer.core.pattern import units

# Every alias and one expression per role mix, with a shape it fits.
CASES: dict[str, tuple[int, ...]] = {
    "unstructured": (6, 8),
    "row": (5, 8),
    "filter": (6, 4, 3, 3),
    "channel": (6, 4, 3, 3),
    "kernel": (6, 4, 3, 3),
    "2:4": (5, 12),
    "1:4": (3, 8),
    "4:8": (2, 16),
    "64:2:8": (128, 8),
    "4-row": (8, 6),
    "4x8": (8, 16),
    "[o] i": (7, 5),
    "{o} [i]": (4, 9),
    "o (g [4])": (4, 12),
    "([o] {2}) (2 [i])": (6, 8),
    "b h {r} q ([n] {4})": (2, 2, 3, 2, 12),
    "t [f]": (4, 7),
}


def exact_budget(s: Tensor, spec: str | Pattern, k: int) -> None:
    who = pattern(spec)
    won_RCT = who.split(select(s, who, Keep(k)).kept)
    assert (won_RCT[..., 0].sum(1) == min(k, won_RCT.shape[1])).all()


def exact_density(s: Tensor, spec: str | Pattern, d: float) -> None:
    who = pattern(spec)
    won_RCT = who.split(select(s, who, Density(d)).kept)
    assert (won_RCT[..., 0].sum(1) == math.floor(d * won_RCT.shape[1] + 0.5)).all()


def tied_units_agree(s: Tensor, spec: str | Pattern, k: int) -> None:
    won_RCT = pattern(spec).split(select(s, spec, Keep(k)).kept)
    assert (won_RCT == won_RCT[..., :1]).all()


def ties_to_lower_index(s: Tensor, spec: str | Pattern, k: int) -> None:
    won_RCT = pattern(spec).split(select(torch.ones_like(s), spec, Keep(k)).kept)
    assert (won_RCT[:, :k].all()) and not won_RCT[:, k:].any()


def best_units_win(s: Tensor, spec: str | Pattern, k: int) -> None:
    """Against a stable sort in plain Python: the same winners, ties included."""
    who = pattern(spec)
    u_RC, won_RC = who.split(s).double().sum(-1), who.split(select(s, who, Keep(k)).kept)[..., 0]
    for u_C, won_C in zip(u_RC.tolist(), won_RC.tolist()):
        best = sorted(range(len(u_C)), key=lambda c: (-u_C[c], c))[:k]
        assert [c for c, won in enumerate(won_C) if won] == sorted(best)


def nested_in_budget(s: Tensor, spec: str | Pattern, k: int) -> None:
    assert select(s, spec, Keep(k)) <= select(s, spec, Keep(k + 1))


def idempotent(s: Tensor, spec: str | Pattern, k: int) -> None:
    """Scores are positive here, so zeroing the losers changes nothing."""
    won = select(s, spec, Keep(k))
    assert select(s * won.kept, spec, Keep(k)) == won or k == 0


def scale_free(s: Tensor, spec: str | Pattern, k: int) -> None:
    assert select(s * 4, spec, Keep(k)) == select(s, spec, Keep(k))  # ×4 is exact in floating point


def round_trip(s: Tensor, spec: str | Pattern, k: int) -> None:
    who = pattern(spec)
    if who.pools(s.shape)[2] == 1:
        assert (who.merge(who.split(s)[..., 0], s.shape) == s).all()
    index = torch.arange(s.numel()).view(s.shape)
    assert sorted(who.split(index).flatten().tolist()) == list(range(s.numel()))


def within_is_respected(s: Tensor, spec: str | Pattern, k: int) -> None:
    who = pattern(spec)
    room = Support(
        who.merge(torch.rand(who.pools(s.shape)[:2], generator=torch.Generator().manual_seed(k)) > 0.5, s.shape)
    )
    won = select(s, who, Keep(k), within=room)
    assert won <= room
    eligible_R = who.split(room.kept)[..., 0].sum(1)
    assert (who.split(won.kept)[..., 0].sum(1) == eligible_R.clamp(max=k)).all()


def minus_infinity_stays_out(s: Tensor, spec: str | Pattern, k: int) -> None:
    assert select(torch.full_like(s, -math.inf), spec, Keep(k)).count == 0


def units_are_sums(s: Tensor, spec: str | Pattern, k: int) -> None:
    who = pattern(spec)
    u_RC = units(torch.ones_like(s), who)
    assert (u_RC == who.pools(s.shape)[2]).all()


PER_CASE = (
    exact_budget,
    tied_units_agree,
    ties_to_lower_index,
    best_units_win,
    nested_in_budget,
    idempotent,
    scale_free,
    round_trip,
    within_is_respected,
    minus_infinity_stays_out,
    units_are_sums,
)


def nested_pools_are_optimal(s: Tensor) -> None:
    """2 of 4, then 3 of each row within them: the best value that any set of these counts can have."""
    groups = select(s, "2:4", Keep(2))
    won = select(s, "row", Keep(3), within=groups)
    for row, kept in zip(torch.where(groups.kept, s, 0), won.kept):
        best = max(sum(c) for c in itertools.combinations(row.tolist(), 3))
        assert math.isclose(float(row[kept].sum()), best, rel_tol=1e-6)


def model_wide_count_is_exact(rule: str, shapes: dict[str, tuple[int, ...]], d: float) -> None:
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    densities = allocation(rule)(shapes, d)
    assert all(0 <= v <= 1 for v in densities.values())
    assert sum(count(densities[n], sizes[n]) for n in shapes) == count(d, sum(sizes.values()))


def erk_of_rigl() -> None:
    """By hand. Layers a = [10, 10], b = [2, 4, 3, 3], model density 0.25 → 43 of 172.

    Raw: a 20/100 = 0.2, b 12/72 = 1/6. ε = 43/(0.2·100 + 72/6) = 43/32 = 1.34375; a 26.875, b 16.125 → 27, 16.
    """
    got = erk({"a": (10, 10), "b": (2, 4, 3, 3)}, 0.25)
    assert {n: round(v * s) for (n, v), s in zip(got.items(), (100, 72))} == {"a": 27, "b": 16}


def erk_fills_and_repeats() -> None:
    """By hand. a = [100, 100] raw 0.02, b = [2, 2] raw 1. Density 0.5 → 5002 of 10004.

    ε = 5002/(200 + 4) = 24.5 gives b 24.5 > 1, so b is dense and a keeps the other 4998.
    """
    got = erk({"a": (100, 100), "b": (2, 2)}, 0.5)
    assert got["b"] == 1.0 and round(got["a"] * 10000) == 4998


def support_algebra(a: Support, b: Support, c: Support) -> None:
    assert ~~a == a and (a & ~a).count == 0 and (a | ~a).density == 1.0
    assert ~(a & b) == (~a | ~b) and a & (b | c) == (a & b) | (a & c)
    assert a - b == a & ~b and (a & b) <= a <= (a | b)
    assert (a <= b) == ((a - b).count == 0)
    assert len(a.indices()) == a.count == int(a.mask(torch.float32).sum())
