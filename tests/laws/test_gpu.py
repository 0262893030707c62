"""The waist on a GPU: the same masks, counts and values as on the CPU, in every float width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from waist import CASES

from gossamer.core import (
    Above,
    Budget,
    Density,
    Gaussian,
    Keep,
    Mass,
    Pattern,
    Support,
    hard,
    select,
    soft,
    straight_through,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Counting budgets. The others cut at a sum, which a GPU may round otherwise: their cases keep clear of the cut.
COUNTED = (Keep(1), Keep(2), Density(0.1), Density(0.5), Density(1.0))


def scores(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small whole numbers with many ties: exact in every dtype, and their sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, shape, generator=generator).to(dtype)


def same(s: Tensor, spec: str | Pattern, budget: Budget, within: Support | None = None) -> None:
    here = select(s, spec, budget, within=within)
    there = select(s.cuda(), spec, budget, within=None if within is None else within.to("cuda"))
    assert there.kept.is_cuda
    assert torch.equal(there.kept.cpu(), here.kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", CASES)
def test_every_pattern_and_counting_budget_selects_the_same(spec, dtype):
    for budget in COUNTED:
        same(scores(CASES[spec], dtype), spec, budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [Above(3.0), Mass(0.7), Gaussian(0.3)], ids=str)
def test_budgets_that_cut_by_value_select_the_same(budget, dtype):
    same(torch.tensor([[8.0, 1.0, 4.0, 2.0, 0.5, 0.25]]).to(dtype).repeat(5, 1), "o [i]", budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_tensor_and_a_choice_within_another(dtype):
    s = scores((512, 1024), dtype)
    first = select(s, "2:4", Keep(2))
    same(s, "2:4", Keep(2))
    same(s, "unstructured", Density(0.3))
    same(s, "row", Density(0.25), within=first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_are_ranked_alike(dtype):
    s = scores((6, 8), dtype)
    s[0, :3], s[1, 5] = -torch.inf, torch.inf
    for budget in COUNTED:
        same(s, "row", budget)


def test_supports_combine_alike():
    a, b = (Support(scores((16, 32), torch.float32, seed) > 4) for seed in (1, 2))
    c, d = a.to("cuda"), b.to("cuda")
    pairs = ((a | b, c | d), (a & b, c & d), (a - b, c - d), (~a, ~c))
    for here, there in pairs:
        assert there.kept.is_cuda and there.to("cpu") == here
        assert (there.count, there.density) == (here.count, here.density)
        assert torch.equal(there.indices().cpu(), here.indices())
    assert (c & d) <= c and not c <= (c - d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [hard, soft(0.5), straight_through], ids=["hard", "soft", "straight_through"])
def test_shrink_rules_give_the_same_values_and_gradients(rule, dtype):
    w = (scores((16, 32), dtype) - 4) / 4
    kept = select(w.abs(), "2:4", Keep(2))
    upstream = scores((16, 32), dtype, seed=3)
    found = []
    for device in ("cpu", "cuda"):
        v = w.to(device).requires_grad_()
        out = rule(v, kept.to(device))
        out.backward(upstream.to(device))
        found.append((out.detach().cpu(), v.grad.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
