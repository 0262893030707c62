"""DSnoT against its naive twin, the official code's masks, and the laws that trades must keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import Density, Keep, Support, get_method, pattern, select
from gossamer.core.errors import BudgetError, CalibrationError, PatternError, UnknownName
from gossamer.methods.weights.dsnot import dsnot
from gossamer.solve import Rule, expected_error, swapped


def statistics(x_NK):
    return {
        "input_norm": x_NK.square().mean(0).sqrt(),
        "input_mean": x_NK.mean(0),
        "input_var": x_NK.var(0, unbiased=False),
        "gram": x_NK.T @ x_NK / len(x_NK),
    }


def problem(rows, columns, seed, tokens=16):
    """Multiples of 1/512 and 1/8, so that no platform rounds them differently."""
    g = torch.Generator().manual_seed(seed)
    w = (torch.randn(rows, columns, generator=g) * 512).round() / 512
    x = torch.randn(1, tokens, columns, generator=g) + torch.randn(columns, generator=g)
    return w, statistics((x[0] * 8).round() / 8)


def naive(w, kept, stats, pools, rule: Rule):
    """The documented procedure, a weight at a time; `pools` are lists of columns."""
    w, kept = w.tolist(), kept.tolist()
    norm, mean, var = (stats[n].tolist() for n in ("input_norm", "input_mean", "input_var"))
    pool_of = {j: pool for pool in pools for j in pool}
    for row, keep in zip(w, kept):
        d = [v * m for v, m in zip(row, mean)]
        worth = [abs(v) * n for v, n in zip(row, norm)]
        grow, cut = {j for j, k in enumerate(keep) if not k}, {j for j, k in enumerate(keep) if k}
        error = sum(d[j] for j in grow)
        first = math.copysign(1, error)
        for _ in range(rule.cycles):
            if abs(error) <= rule.threshold:
                break
            sign = math.copysign(1, error)
            candidates = [j for j in sorted(grow) if sign * d[j] > 0]
            if not candidates:
                break
            g = max(candidates, key=lambda j: sign * d[j] / max(var[j], 1e-12 * max(var)) ** rule.variance_power)
            grow.remove(g)
            inside = cut & set(pool_of[g])
            gives = sorted(inside) if len(pools) > 1 else [j for j in sorted(inside) if sign * d[j] < 0]
            if not gives:
                continue
            c = min(gives, key=lambda j: worth[j])
            after = error + d[c] - d[g]
            if rule.keep_sign and after * first <= 0:
                break
            cut.remove(c)
            keep[g], keep[c], error = True, False, after
    return torch.tensor(kept)


CASES = [("row", [list(range(48))]), ("2:4", [list(range(j, j + 4)) for j in range(0, 48, 4)])]
CASES += [("4:8", [list(range(j, j + 8)) for j in range(0, 48, 8)]), ("unstructured", [list(range(48))])]
CASES += [("o ([m] g)", [list(range(j, 48, 12)) for j in range(12)])]  # columns 12 apart compete


@pytest.mark.parametrize("spec, pools", CASES)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
)
def test_matches_the_naive_procedure(spec, pools, seed, density, cycles, power, keep_sign):
    w, stats = problem(5, 48, seed)
    who = pattern(spec) if spec != "o ([m] g)" else pattern("o ([4] g)")
    budget = Density(density) if who.kept is None else Keep(who.kept)
    start = select(w.abs() * stats["input_norm"], who, budget)
    rule = Rule(cycles, 1e-3, power, keep_sign)
    got = swapped(w, start, stats, who, rule)
    assert (got.kept == naive(w, start.kept, stats, pools, rule)).all()
    assert (got.kept.sum(1) == start.kept.sum(1)).all() and got.count == start.count


# Masks printed by the official code: the body of prune_DSnoT (zyxxmu/DSnoT 4c029df, lib/prune.py) and the statistics of
# its WrappedGPT, run on problem(4, 64, 0) as one sequence of 16 tokens. 1 = kept, column 0 leads.
OFFICIAL = [
    (
        {"density": 0.5, "cycles": 6},
        ("8b46cf8f020723fe", "7f0d4f61cc1748a5", "e7341d60a3052bef", "c5458fe24513da6b"),
    ),
    (
        {"density": 0.25, "cycles": 6, "initial": "magnitude"},
        ("c1404180000720bc", "7c040a60800142a0", "a3101420020120e9", "01440de00113080a"),
    ),
    (
        {"density": 0.5, "cycles": 50, "keep_sign": True},
        ("cd46d5cf2207227e", "7d8d4e61dc074aa5", "eb341469c3052bef", "455c9fe2411fd86a"),
    ),
    (
        {"pattern": "2:4", "cycles": 7, "keep_sign": True},
        ("c956c5c5a365633c", "c5a566699c33caa5", "a3369669c3953aa5", "a55596ca5533ca63"),
    ),
    (
        {"pattern": "4:8", "cycles": 50, "keep_sign": True},
        ("c9564d8da30fe1b8", "c53c4ee19c174ea5", "a3361e69c3172ba5", "a55c8de24717ca6a"),
    ),
]


@pytest.mark.parametrize("options, masks", OFFICIAL)
def test_matches_the_official_code(options, masks):
    w, stats = problem(4, 64, 0)
    _, support = dsnot(threshold=0.1 / 16, **options).apply(w, stats)
    got = [f"{int(''.join('01'[v] for v in row), 2):016x}" for row in support.kept.tolist()]
    assert got == list(masks)


@pytest.mark.parametrize("initial", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("spec", ["row", "2:4", "unstructured"])
def test_keeps_the_counts_and_the_values_of_its_first_method(initial, spec):
    w, stats = problem(24, 96, 3)
    new, support = dsnot(pattern=spec, initial=initial).apply(w, stats)
    first = get_method(initial)(pattern=spec)
    start = select(first.score(w, stats), first.pattern, first.budget)
    assert (support.kept.sum(1) == start.kept.sum(1)).all() and support != start
    assert (new[support.kept] == w[support.kept]).all() and (new[~support.kept] == 0).all()
    groups = support.kept.view(24, -1, 4).sum(2)
    assert spec != "2:4" or (groups == 2).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["row", "2:4"]))
def test_trades_that_keep_the_sign_make_no_row_worse(seed, spec):
    w, stats = problem(8, 32, seed)
    first, refined = (get_method("wanda")(pattern=spec), dsnot(pattern=spec, keep_sign=True))
    before = expected_error(w, first.apply(w, stats)[1], stats)
    after = expected_error(w, refined.apply(w, stats)[1], stats)
    assert (after.sign() == before.sign()).all()
    if spec == "row":  # in groups the one to cut is there for the count, not for the error
        assert (after.abs() <= before.abs() + 1e-5).all()


@pytest.mark.parametrize("initial", ["wanda", "magnitude"])
def test_the_expected_error_falls(initial):
    w, stats = problem(64, 256, 11)
    before = expected_error(w, get_method(initial)(pattern="row", density=0.3).apply(w, stats)[1], stats)
    after = expected_error(w, dsnot(density=0.3, initial=initial).apply(w, stats)[1], stats)
    assert after.abs().mean() < 0.5 * before.abs().mean()


def test_rows_in_chunks_are_the_rows_at_once(monkeypatch):
    w, stats = problem(50, 64, 5)
    whole = dsnot().apply(w, stats)[1]
    monkeypatch.setattr("gossamer.solve.swaps.CHUNK", 64 * 7)
    assert dsnot().apply(w, stats)[1] == whole


def test_convolutions_and_half_types():
    w, stats = problem(8, 36, 7)
    flat = dsnot(density=0.4).apply(w, stats)[1]
    assert (dsnot(density=0.4).apply(w.view(8, 4, 3, 3), stats)[1].kept.flatten(1) == flat.kept).all()
    half = w.bfloat16()
    assert dsnot(density=0.4).apply(half, stats)[1] == dsnot(density=0.4).apply(half.float(), stats)[1]


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_to_trade(density):
    w, stats = problem(3, 8, 1)
    assert dsnot(density=density).apply(w, stats)[1].density == density


def test_inputs_that_never_change():
    w, stats = problem(4, 16, 2)
    still = stats | {"input_var": torch.zeros(16)}
    by_mean = dsnot(variance_power=0).apply(w, stats)[1]
    assert dsnot().apply(w, still)[1] == by_mean  # all equally calm, so the mean alone decides


def test_refusals():
    w, stats = problem(4, 16, 2)
    with pytest.raises(UnknownName, match="wanda"):
        dsnot(initial="wunda")
    with pytest.raises(BudgetError, match="cycles >= 1"):
        dsnot(cycles=0)
    with pytest.raises(PatternError, match="single weights"):
        dsnot(pattern="4-row").apply(w, stats)
    with pytest.raises(CalibrationError, match="input_mean"):
        dsnot().apply(w, {"input_norm": stats["input_norm"]})
    assert swapped(w, Support(w > 9), stats, pattern("row"), Rule()).count == 0
