"""Each law must kill a planted fault: break one function of the waist, and the law that guards it must fail."""

from __future__ import annotations

import math

import pytest
import torch
import waist

from gossamer.core import Support, allocation, budget
from gossamer.core.pattern import Pattern

real_top = budget.top


def _stable(s_RC, k, *, flip=False, smallest=False):
    s_RC = s_RC.flip(1) if flip else s_RC
    order = s_RC.argsort(dim=1, descending=not smallest, stable=True)[:, :k]
    won = torch.zeros_like(s_RC, dtype=torch.bool).scatter(1, order, True)
    return won.flip(1) if flip else won


def one_too_many(s_RC, k):
    return real_top(s_RC, k + 1)


def at_or_above_threshold(s_RC, k):
    """What a threshold without tie handling keeps."""
    if k <= 0:
        return torch.zeros_like(s_RC, dtype=torch.bool)
    return s_RC >= s_RC.sort(1, descending=True).values[:, min(k, s_RC.shape[1]) - 1 :][:, :1]


def ties_to_the_higher(s_RC, k):
    return _stable(s_RC, k, flip=True)


def lowest(s_RC, k):
    return _stable(s_RC, k, smallest=True)


def unstable_in_k(s_RC, k):
    return real_top(s_RC if k % 2 else -s_RC, k)


def absolute_threshold(s_RC, k):
    """Shifts by a constant before ranking in coarse steps, so scale matters."""
    return real_top((s_RC * 8).round(), k)


TIED = torch.tensor([[2.0, 1.0, 2.0, 2.0, 1.0, 3.0, 0.5, 0.25]]).repeat(4, 1)
FINE = torch.tensor([[0.51, 0.53, 0.52, 0.50, 0.03, 0.02, 0.01, 0.04]]).repeat(4, 1)


@pytest.mark.parametrize(
    "law, fault, s",
    [
        (waist.exact_budget, one_too_many, TIED),
        (waist.exact_budget, at_or_above_threshold, TIED),
        (waist.ties_to_lower_index, ties_to_the_higher, TIED),
        (waist.best_units_win, ties_to_the_higher, TIED),
        (waist.best_units_win, lowest, FINE),
        (waist.nested_in_budget, unstable_in_k, FINE),
        (waist.idempotent, lowest, FINE),
        (waist.scale_free, absolute_threshold, FINE),
        (waist.minus_infinity_stays_out, lambda s, k: _stable(s, k), TIED),
        (waist.within_is_respected, lambda s, k: _stable(s.nan_to_num(neginf=9.0), k), TIED),
    ],
)
def test_wrong_top(monkeypatch, law, fault, s):
    law(s, "row", 2)
    monkeypatch.setattr(budget, "top", fault)
    with pytest.raises(AssertionError):
        law(s, "row", 2)


def test_wrong_partition(monkeypatch):
    s = torch.arange(100.0).view(2, 50)
    real = budget._kth
    monkeypatch.setattr(budget, "_kth", lambda s_RC, k: real(s_RC, k + 1))
    with pytest.raises(AssertionError):
        waist.best_units_win(s, "row", 10)


def test_merge_that_forgets_a_tied_entry(monkeypatch):
    real = Pattern.merge

    def merge(self, u_RC, shape):
        full = real(self, u_RC, shape).clone()
        full.view(-1)[0] = ~full.view(-1)[0]
        return full

    monkeypatch.setattr(Pattern, "merge", merge)
    with pytest.raises(AssertionError):
        waist.tied_units_agree(TIED, "4-row", 3)


def test_merge_that_does_not_undo_the_permutation(monkeypatch):
    monkeypatch.setattr(Pattern, "merge", lambda self, u_RC, shape: u_RC.reshape(shape))
    with pytest.raises(AssertionError):
        waist.round_trip(TIED, "[o] i", 2)


def test_units_that_average(monkeypatch):
    monkeypatch.setattr(waist, "units", lambda s, who: who.split(s).mean(-1))
    with pytest.raises(AssertionError):
        waist.units_are_sums(TIED, "4-row", 2)


def test_density_that_rounds_down(monkeypatch):
    monkeypatch.setattr(budget, "count", lambda d, n: math.floor(d * n))
    with pytest.raises(AssertionError):
        waist.exact_density(FINE, "row", 0.7)


def test_nested_pools_that_ignore_the_outer(monkeypatch):
    s = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]])
    real = waist.select
    monkeypatch.setattr(waist, "select", lambda s, p, b, within=None: real(s, p, b))
    with pytest.raises(AssertionError):
        waist.nested_pools_are_optimal(s)


def test_allocation_that_only_rounds(monkeypatch):
    shapes = {str(i): (1, 3) for i in range(4)}
    waist.model_wide_count_is_exact("uniform", shapes, 0.5)
    monkeypatch.setattr(waist, "allocation", lambda rule: lambda shapes, d: {n: d for n in shapes})
    with pytest.raises(AssertionError):
        waist.model_wide_count_is_exact("uniform", shapes, 0.5)


def test_erk_without_kernels(monkeypatch):
    monkeypatch.setattr(waist, "erk", allocation("er"))
    with pytest.raises(AssertionError):
        waist.erk_of_rigl()


@pytest.mark.parametrize(
    "operator, fault",
    [
        ("__and__", Support.__or__),
        ("__or__", Support.__and__),
        ("__sub__", Support.__and__),
        ("__invert__", lambda a: a),
        ("__le__", lambda a, b: True),
    ],
)
def test_support_with_a_wrong_operator(monkeypatch, operator, fault):
    a, b, c = (Support(torch.tensor(v)) for v in ([True, False, True], [True, True, False], [False, True, True]))
    waist.support_algebra(a, b, c)
    monkeypatch.setattr(Support, operator, fault)
    with pytest.raises(AssertionError):
        waist.support_algebra(a, b, c)
