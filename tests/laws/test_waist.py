"""Every law of the waist on every pattern, over random scores, types and budgets."""

from __future__ import annotations

import math

import pytest
import torch
import waist
from hypothesis import given, settings
from hypothesis import strategies as st
from waist import CASES

from gossamer.core import (
    Above,
    Density,
    Gaussian,
    Keep,
    Linear,
    Mass,
    Pattern,
    Support,
    by_sensitivity,
    pattern,
    select,
    select_across,
)
from gossamer.core.budget import count
from gossamer.core.errors import BudgetError, NonFiniteError, PatternError

KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def scores(shape: tuple[int, ...], seed: int, kind: torch.dtype, levels: int) -> torch.Tensor:
    """Positive, from `levels` different values, so that few levels make many ties. Sums are exact in every type."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(1, levels, shape, generator=generator) / 64).to(kind)


@pytest.mark.parametrize("law", waist.PER_CASE, ids=lambda law: law.__name__)
@pytest.mark.parametrize("spec", CASES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(0, 6), kind=st.sampled_from(KINDS), levels=st.sampled_from((3, 200)))
def test_law(law, spec, seed, k, kind, levels):
    law(scores(CASES[spec], seed, kind, levels), spec, k)


@pytest.mark.parametrize("spec", CASES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.floats(0, 1))
def test_density_is_exact_in_every_pool(spec, seed, d):
    waist.exact_density(scores(CASES[spec], seed, torch.float32, 50), spec, d)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_nested_pools_are_optimal(seed):
    waist.nested_pools_are_optimal(scores((3, 12), seed, torch.float64, 1000))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95), st.sampled_from((20, 700)))
def test_large_pools_keep_exactly_k(seed, d, levels):
    """Pools of thousands take the partition path, not the pairwise one; both kinds of memory layout."""
    s = scores((40, 90), seed, torch.float32, levels)
    for x in (s, s.t(), s[:, ::3]):
        waist.exact_density(x, "[...]", d)
        waist.best_units_win(x, "[...]", count(d, x.numel()))
        waist.best_units_win(x, "row", count(d, x.shape[1]))


def test_select_across_is_one_pool():
    s = {"a": torch.tensor([[1.0, 9.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 2.0, 9.0])}
    won = select_across({n: x.view(x.shape[0], -1) for n, x in s.items()}, "unstructured", Keep(3))
    assert won["a"].kept.tolist() == [[False, True], [False, False]]
    assert won["b"].kept.flatten().tolist() == [True, False, True]


def test_select_across_ranks_blocks_by_mean():
    s = {"a": torch.full((4, 2), 2.0), "b": torch.full((4, 2), 1.0)}
    s["a"][0] = 0.1  # sums 6.1 against 4: mean still ahead
    won = select_across(s, "4-row", Keep(2))
    assert won["a"].density == 1.0 and won["b"].density == 0.0


@pytest.mark.parametrize("rule", ["uniform", "er", "erk"])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.sampled_from(((), (3, 3)))), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_allocations_keep_the_models_count(rule, shapes, d):
    waist.model_wide_count_is_exact(rule, {str(i): (*s[:2], *s[2]) for i, s in enumerate(shapes)}, d)


def test_erk_matches_rigl_by_hand():
    waist.erk_of_rigl()
    waist.erk_fills_and_repeats()


def test_by_sensitivity_matches_brute_force():
    """Convex curves on a grid of tenths, equal sizes: try all pairs of densities with the right sum."""
    curves = {
        "a": {i / 10: 3 * (1 - i / 10) ** 2 for i in range(11)},
        "b": {i / 10: (1 - i / 10) ** 2 for i in range(11)},
    }
    got = by_sensitivity(curves, {"a": 10, "b": 10}, 0.5)
    best = min(((i, 10 - i) for i in range(11)), key=lambda ab: sum(c[x / 10] for c, x in zip(curves.values(), ab)))
    assert (round(got["a"] * 10), round(got["b"] * 10)) == best


def test_by_sensitivity_refuses_what_was_not_measured():
    with pytest.raises(BudgetError, match="outside the measured"):
        by_sensitivity({"a": {0.5: 1.0, 1.0: 0.0}}, {"a": 10}, 0.2)


def test_mass_is_the_smallest_set():
    s = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    assert select(s, "q [t]", Mass(0.7)).kept.tolist() == [[True, True, False, False], [True, True, True, False]]


def test_above_is_strict():
    assert select(torch.tensor([[1.0, 2.0, 3.0]]), "row", Above(2.0)).kept.tolist() == [[False, False, True]]


def test_gaussian_hits_its_density_on_normal_scores():
    s = torch.randn(4, 20000, generator=torch.Generator().manual_seed(0))
    assert abs(select(s, "row", Gaussian(0.08)).density - 0.08) < 0.005


def test_budgets_follow_schedules():
    s = torch.arange(10.0)[None]
    assert [select(s, "row", Density(Linear(1.0, 0.2, 0, 4)), step=t).count for t in (0, 2, 4)] == [10, 6, 2]


def test_plus_infinity_always_wins_and_nan_is_refused():
    s = torch.tensor([[1.0, math.inf, 3.0]])
    assert select(s, "row", Keep(1)).kept.tolist() == [[False, True, False]]
    with pytest.raises(NonFiniteError, match="1 of 3 scores are NaN"):
        select(torch.tensor([[1.0, math.nan, 3.0]]), "row", Keep(1))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (1, 8), (8, 1), (0, 0)])
@pytest.mark.parametrize("spec", ["unstructured", "row", "[o] i", "filter"])
def test_empty_and_thin_tensors(shape, spec):
    for d in (0.0, 0.5, 1.0):
        won = select(torch.ones(shape), spec, Density(d))
        assert won.shape == shape
        if min(shape):
            waist.exact_density(torch.ones(shape), spec, d)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("unstructred", "did you mean 'unstructured'"),
        ("o [i", "never closed"),
        ("o i]", "closes nothing"),
        ("o [i {j}]", "one role"),
        ("((o) i)", "side by side"),
        ("o o", "appears twice"),
        ("( ) i", "empty"),
        ("o (...)", "whole axes"),
        ("o ; i", "cannot read ';'"),
        ("5:4", "0 < N <= M"),
        ("0-row", "sizes start at 1"),
        ("", "at least one axis"),
    ],
)
def test_broken_patterns_say_what_to_do(spec, words):
    with pytest.raises(PatternError, match=words.replace("[", r"\[").replace("(", r"\(")):
        pattern(spec).pools((4, 4))


def test_patterns_that_do_not_fit_say_so():
    with pytest.raises(PatternError, match="length 6, not a multiple of 4"):
        select(torch.ones(3, 6), "2:4", Keep(2))
    with pytest.raises(PatternError, match="names 2 axes"):
        select(torch.ones(3), "[o] i", Keep(2))
    with pytest.raises(PatternError, match="size for all but one"):
        pattern("o (a [b])").pools((4, 8))
    with pytest.raises(PatternError, match="no axis 'n'"):
        Pattern("o [m]", n=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_support_algebra(rows):
    a, b, c = (Support(torch.tensor(column)) for column in zip(*rows))
    waist.support_algebra(a, b, c)
    assert a.propagate(lambda kept: kept.flip(0)).count == a.count


def test_supports_refuse_what_they_are_not():
    with pytest.raises(PatternError, match="bool tensor"):
        Support(torch.ones(3))
    with pytest.raises(PatternError, match="different tensors"):
        Support(torch.ones(3, dtype=torch.bool)) & Support(torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("spec", ["unstructured", "row", "2:4", "4-row", "4x8"])
def test_compiled_select_makes_the_same_mask(spec):
    who = pattern(spec)
    budget = Keep(2) if spec == "2:4" else Density(0.4)
    compiled = torch.compile(lambda s: select(s, who, budget).kept, fullgraph=True, backend="eager")
    s = scores((8, 16), 7, torch.float32, 9)
    assert (compiled(s) == select(s, who, budget).kept).all()


def test_a_scheduled_count_is_rounded_between_its_ends() -> None:
    s = torch.arange(10.0)[None]
    counts = [select(s, "o [i]", Keep(Linear(8, 4, steps=10)), step=t).count for t in (0, 3, 5, 10)]
    assert counts == [8, 7, 6, 4]


def test_gaussian_takes_infinite_scores_first_and_leaves_them_out_of_the_mean() -> None:
    s = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    with_inf = torch.cat([torch.full((1, 1), float("inf")), s], 1)
    won, alone = select(with_inf, "o [i]", Gaussian(0.1)).kept, select(s, "o [i]", Gaussian(0.1)).kept
    assert bool(won[0, 0]) and torch.equal(won[:, 1:], alone)
