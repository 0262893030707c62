"""Group lasso: its proximal step against what defines it, and the laws of every proximal step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import BudgetError, PatternError
from gossamer.penalty import Group, group

PATTERNS = ("filter", "channel", "([o] {2}) ([i] {3})", "[o i]")
SEEDS = st.integers(0, 2**16)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def minimised(rule: Group, x: torch.Tensor, step: float) -> torch.Tensor:
    """argmin ½‖z − x‖² + t·λ·Σ‖z_g‖ by iterated reweighting: ‖z‖ ≤ ‖z‖²/2a + a/2, with equality at a = ‖z‖."""
    z = x.clone()
    for _ in range(4000):
        z.requires_grad_(True)
        (pull,) = torch.autograd.grad(rule.value(z + 1e-12), z)
        z = (x / (1 + step * pull / (z + 1e-12))).detach()
    return z


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prox_is_the_minimiser(pattern):
    x, rule = numbers(8, 4, 6), Group(0.7, pattern)
    torch.testing.assert_close(rule.prox(x, 1.3), minimised(rule, x, 1.3), atol=1e-6, rtol=0)


def test_value_and_prox_by_hand():
    x = numbers(0, 3, 5)
    norms = [sum(float(v) ** 2 for v in row) ** 0.5 for row in x]
    assert Group(2.0).value(x).item() == pytest.approx(2 * sum(norms))
    left = [max(1 - 2 * 0.95 / n, 0.0) for n in norms]
    torch.testing.assert_close(Group(2.0).prox(x, 0.95), x * torch.tensor(left, dtype=x.dtype)[:, None])
    assert 0.0 in left and any(left), "the example must show both fates"


@given(a=SEEDS, b=SEEDS, step=st.floats(0, 3), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=60, deadline=None)
def test_prox_is_firmly_nonexpansive(a, b, step, pattern):
    x, y, rule = numbers(a, 4, 6), numbers(b, 4, 6), Group(0.9, pattern)
    apart = rule.prox(x, step) - rule.prox(y, step)
    assert apart.square().sum() <= (apart * (x - y)).sum() + 1e-9


@given(seed=SEEDS, factor=st.floats(0.01, 100), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=60, deadline=None)
def test_scaling(seed, factor, pattern):
    """‖·‖ is homogeneous: prox of c·x at c·t is c times the prox of x at t."""
    x, rule = numbers(seed, 4, 6), Group(0.5, pattern)
    torch.testing.assert_close(rule.value(factor * x), factor * rule.value(x))
    torch.testing.assert_close(rule.prox(factor * x, factor * 1.5), factor * rule.prox(x, 1.5))


@given(seed=SEEDS, step=st.floats(0.01, 3), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=60, deadline=None)
def test_fixed_points_are_the_minimisers(seed, step, pattern):
    """Only 0 is its own prox, for the penalty's one minimiser is 0; a step of 0 changes nothing."""
    x, rule = numbers(seed, 4, 6), Group(1.0, pattern)
    torch.testing.assert_close(rule.prox(torch.zeros_like(x), step), torch.zeros_like(x), atol=0, rtol=0)
    assert rule.prox(x, step).norm() < x.norm()
    torch.testing.assert_close(rule.prox(x, 0.0), x, atol=0, rtol=0)


@given(seed=SEEDS, step=st.floats(0, 6))
@settings(max_examples=60, deadline=None)
def test_several_tensors_are_one_group(seed, step):
    a, b = numbers(seed, 3, 4), numbers(seed + 1, 2)
    rule, flat = Group(0.8), Group(0.8, "{i}")
    joined = torch.cat([a.flatten(), b])
    torch.testing.assert_close(rule.value([a, b]), flat.value(joined))
    torch.testing.assert_close(torch.cat([p.flatten() for p in rule.prox([a, b], step)]), flat.prox(joined, step))


def test_groups_become_exactly_zero_and_stay():
    x = torch.tensor([[3e-3, 4e-3], [3.0, 4.0]], requires_grad=True)
    out = Group().prox(x, 1e-2)
    assert out[0].tolist() == [0.0, 0.0] and out[1].count_nonzero() == 2
    (pull,) = torch.autograd.grad(Group().value(out), x)
    assert pull.isfinite().all() and pull[0].tolist() == [0.0, 0.0]


def test_bad_input():
    with pytest.raises(BudgetError, match="strength is a number of at least 0, got -1"):
        Group(-1)
    with pytest.raises(BudgetError, match="step is a number of at least 0, got nan"):
        Group().prox(torch.ones(2, 2), float("nan"))
    with pytest.raises(PatternError, match="not a multiple of 2"):
        Group(1.0, "([o] {2}) ...").value(torch.ones(3, 2))


@pytest.mark.parametrize(
    "fault",
    [
        lambda norm, limit: 1 - limit / norm,  # small groups turn round instead of going
        lambda norm, limit: norm / (norm + limit),  # shrinks, and leaves nothing at zero
        lambda norm, limit: (norm > limit).to(norm.dtype),  # keeps or drops, and never shrinks
    ],
)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(group, "_left", fault)
    with pytest.raises(AssertionError):
        test_prox_is_the_minimiser("[o i]")
