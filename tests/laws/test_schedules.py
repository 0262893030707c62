"""Schedules start and end where they say and never turn back; policies fall due where they say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core import Constant, Cosine, Cubic, Exponential, Linear, OneShot, Ramp, Step
from gossamer.core.errors import BudgetError

SPANS = (Linear, Cubic, Cosine, Exponential)
value = st.floats(0.01, 1.0)


@pytest.mark.parametrize("kind", SPANS)
@given(start=value, end=value, begin=st.integers(0, 50), steps=st.integers(1, 200))
def test_ends_are_exact_and_the_way_is_monotone(kind, start, end, begin, steps):
    schedule = kind(start, end, begin, steps)
    values = [schedule(t) for t in range(begin, begin + steps + 1)]
    assert schedule(0) == pytest.approx(start) and schedule(begin) == pytest.approx(start)
    assert schedule(begin + steps) == end == schedule(10**9)
    rising = [b - a for a, b in zip(values, values[1:])]
    assert all(r * (end - start) >= -1e-12 for r in rising)


@given(start=value, end=value, t=st.integers(0, 100))
def test_values_in_the_middle(start, end, t):
    p = t / 100
    assert Linear(start, end, 0, 100)(t) == pytest.approx(start * (1 - p) + end * p)
    assert Cosine(start, end, 0, 100)(t) == pytest.approx(end + (start - end) * (1 + math.cos(math.pi * p)) / 2)
    assert Exponential(start, end, 0, 100)(t) == pytest.approx(start ** (1 - p) * end**p)


def test_step_and_constant():
    schedule = Step(1.0, ((10, 0.5), (20, 0.25)))
    assert [schedule(t) for t in (0, 9, 10, 19, 20, 999)] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert Constant(0.3)(12345) == 0.3


def test_out_of_range_is_refused():
    with pytest.raises(BudgetError, match="steps >= 1"):
        Linear(1, 0, 0, 0)
    with pytest.raises(BudgetError, match="> 0"):
        Exponential(1.0, 0.0, 0, 10)
    with pytest.raises(BudgetError, match="rising"):
        Step(1.0, ((20, 0.5), (10, 0.2)))


@given(begin=st.integers(0, 20), length=st.integers(0, 50), every=st.integers(1, 9))
def test_a_ramp_falls_due_at_both_ends_and_every_few_steps(begin, length, every):
    due = [t for t in range(100) if Ramp(begin, begin + length, every).due(t)]
    assert due == sorted({*range(begin, begin + length + 1, every), begin + length})
    assert [t for t in range(30) if OneShot(begin).due(t)] == [begin]
