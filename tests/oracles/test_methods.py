"""One-shot methods against naive NumPy twins, the ramp against its formula, the knee against known knees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gossamer.methods  # noqa: F401 - fills the registry
from gossamer.core import Density, Support, get_method, methods, select_across
from gossamer.core.errors import BudgetError, CalibrationError, NonFiniteError, PatternError, UnknownName
from gossamer.recipes.curve import sparsity_curve
from gossamer.score import random as by_lot
from gossamer.score import salt

KINDS = (torch.float32, torch.bfloat16, torch.float16)
SCHEDULED = ("gradual_magnitude", "fast_sparse_convnets", "rigl", "set", "decaying_mask", "decaying_structure")
SCHEDULED += ("iss_p", "sparse_pretraining")
SCHEDULED += ("lottery_jackpots", "g2gnet")
HAND_OPTIONS = {name: {"total_steps": 100, "every": 10} for name in SCHEDULED}
HAND_OPTIONS["gqsa"] = {"pattern": "row"}  # its own groups are too few in small weights
N_OF_M = ("sr_ste", "decaying_mask", "decaying_structure", "bdwp")  # their patterns fix the density


def build(name: str, **options):
    return get_method(name)(**{**HAND_OPTIONS.get(name, {}), **options})


def weight(rows: int, columns: int, seed: int, kind=torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(kind)


def keep_top(s: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros(s.size, bool)
    kept[np.argsort(-s.ravel(), kind="stable")[:k]] = True
    return kept.reshape(s.shape)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 9), st.integers(1, 30))
def test_magnitude(kind, seed, d, rows, columns):
    w = weight(rows, columns, seed, kind)
    got, support = build("magnitude", density=d).apply(w, {})
    want = keep_top(w.abs().double().numpy(), math.floor(d * w.numel() + 0.5))
    assert (support.kept.numpy() == want).all() and got.dtype == kind
    assert (got.double().numpy() == np.where(want, w.double().numpy(), 0)).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_wanda_per_row(kind, seed, d):
    w, norm = weight(6, 20, seed, kind), weight(1, 20, seed + 1)[0].abs()
    got, support = build("wanda", density=d).apply(w, {"input_norm": norm})
    score = np.abs(w.float().numpy()) * norm.numpy()
    want = np.stack([keep_top(row, math.floor(d * 20 + 0.5)) for row in score])
    assert (support.kept.numpy() == want).all() and (got[support.kept] == w[support.kept]).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_wanda_in_groups_and_on_convolutions(seed):
    w, norm = weight(6, 72, seed), weight(1, 72, seed + 1)[0].abs()
    _, support = build("wanda", pattern="2:4").apply(w, {"input_norm": norm})
    score = np.abs(w.numpy()) * norm.numpy()
    want = np.stack([keep_top(g, 2) for g in score.reshape(-1, 4)]).reshape(6, 72)
    assert (support.kept.numpy() == want).all()
    _, conv = build("wanda").apply(w.view(6, 8, 3, 3), {"input_norm": norm})
    want = np.stack([keep_top(row, 36) for row in score])
    assert (conv.kept.flatten(1).numpy() == want).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_global_magnitude_is_one_pool(seed, d):
    ws = {"a": weight(4, 9, seed), "b": 3 * weight(5, 5, seed + 1)}
    sparsifier = build("global_magnitude", density=d)
    assert sparsifier.scope == "model"
    won = select_across({n: sparsifier.score(w, {}) for n, w in ws.items()}, sparsifier.pattern, sparsifier.budget)
    want = keep_top(np.concatenate([w.abs().numpy().ravel() for w in ws.values()]), math.floor(d * 61 + 0.5))
    assert (np.concatenate([s.kept.numpy().ravel() for s in won.values()]) == want).all()


def test_global_pools_refuse_fixed_groups():
    with pytest.raises(PatternError, match="use method 'magnitude'"):
        build("global_magnitude", pattern="2:4")


def test_essential_sparsity_is_global_magnitude_or_groups():
    w = weight(4, 16, 0)
    assert build("essential_sparsity", density=0.3).apply(w, {})[1] == build("magnitude", density=0.3).apply(w, {})[1]
    assert build("essential_sparsity", pattern="2:4").scope == "layer"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_random_is_exact_and_repeats(seed, d):
    w = weight(7, 11, 0)
    first, again, other = (build("random", density=d, seed=s).apply(w, {})[1] for s in (seed, seed, seed + 1))
    assert first == again and first.count == other.count == math.floor(d * 77 + 0.5)
    half = build("random", density=d, seed=seed).apply(w.bfloat16(), {})[1]
    assert half == first


def test_random_lots_are_uniform_and_salted():
    w = torch.zeros(64, 64)
    a, b = (by_lot(1)(w, {"salt": salt(name)}) for name in ("layer.0", "layer.1"))
    assert not (a == b).all() and abs(float(a.mean()) - 0.5) < 0.02
    kept = sum(Support(by_lot(s)(w, {}) > 0.9).kept.float() for s in range(200))
    assert float(kept.max()) < 50  # expected 20 of 200, so no entry is favoured


@pytest.mark.parametrize("begin, end, every", [(0, 1000, 100), (7, 97, 13)])
def test_gradual_ramp_is_the_formula_of_zhu_and_gupta(begin, end, every):
    how = {"total_steps": 2 * end, "begin": begin, "until": end, "every": every}
    sparsifier = build("gradual_magnitude", density=0.1, **how)
    w = weight(10, 100, 0)
    for t in range(begin, end + 1, every):
        s = 0.9 + (0.0 - 0.9) * (1 - (t - begin) / (end - begin)) ** 3
        assert sparsifier.policy.due(t)
        assert sparsifier.apply(w, {}, step=t)[1].count == math.floor((1 - s) * 1000 + 0.5)
    assert sparsifier.policy.due(end) and not sparsifier.policy.due(end + every)
    assert sparsifier.apply(w, {}, step=end)[1].count == 100


@pytest.mark.parametrize("name", ["gradual_magnitude", "fast_sparse_convnets"])
def test_a_ramp_ends_within_the_run_and_leaves_a_quarter_of_it(name):
    rule = build(name, density=0.1, total_steps=1000, begin=300)
    assert rule.policy.due(750) and not any(rule.policy.due(t) for t in range(751, 1001))
    assert (rule.budget.d(300), rule.budget.d(750)) == (1.0, 0.1)
    with pytest.raises(BudgetError, match="begin < until"):
        build(name, total_steps=1000, begin=750)
    with pytest.raises(BudgetError, match="run ends at 1000"):
        build(name, total_steps=1000, until=1001)


def test_an_allocation_moves_the_end_of_a_ramp_and_keeps_the_ramp():
    moved = build("gradual_magnitude", density=0.1).at_density(0.3)
    assert moved.budget.d(0) == 1.0 and moved.budget.d(100) == 0.3


def test_gradual_refuses_what_cannot_ramp():
    with pytest.raises(BudgetError, match="cannot ramp"):
        build("gradual_magnitude", pattern="2:4")
    with pytest.raises(BudgetError, match="fraction KEPT"):
        build("gradual_magnitude", density=90)


@pytest.mark.parametrize("name", methods())
def test_every_method_keeps_its_promises(name):
    """Exact count, zeros off the support, the input untouched, the same answer twice, no NaN spread."""
    w, x = weight(8, 32, 1), weight(64, 32, 2)
    stats = {"gram": x.T @ x / 64, "input_norm": x.pow(2).mean(0).sqrt(), "tokens": torch.tensor(64)}
    stats |= {"input_mean": x.mean(0), "input_var": x.var(0, unbiased=False)}
    stats |= {name: weight(8, 32, 3) for name in ("gradient", "hessian_gradient", "flow")}
    before = w.clone()
    for d in (0.25, 0.5, 1.0) if name in N_OF_M else (0.0, 0.25, 1.0):
        sparsifier = build(name, **({"pattern": f"{int(4 * d)}:4"} if name in N_OF_M else {"density": d}))
        got, support = sparsifier.apply(w, stats, step=10**6)
        assert support.count == d * 256 and not got[~support.kept].any() and got.isfinite().all()
        assert (sparsifier.apply(w, stats, step=10**6)[0] == got).all() and (w == before).all()
        assert name in N_OF_M or sparsifier.at_density(0.5).apply(w, stats, step=10**6)[1].count == 128
    with pytest.raises(NonFiniteError):
        build(name).apply(w / 0, stats)


@pytest.mark.parametrize("name", methods())
def test_every_method_is_documented(name):
    method = get_method(name)
    text = method.build.__doc__ or ""
    assert method.summary.endswith(".") and method.paper and "Reference:" in text and "Example:" in text
    option = "pattern" if name in ("bdwp", "decaying_structure") else "density"
    with pytest.raises(UnknownName, match=f"did you mean '{option}'"):
        method(**{option[:-1]: 0.5})


def test_statistics_are_checked_by_name():
    w = weight(4, 8, 0)
    with pytest.raises(CalibrationError, match="'input_norm' is missing"):
        build("wanda").apply(w, {})
    with pytest.raises(CalibrationError, match=r"needs \(8,\)"):
        build("wanda").apply(w, {"input_norm": torch.ones(4)})
    with pytest.raises(NonFiniteError, match="'input_norm' has 1 NaN"):
        build("wanda").apply(w, {"input_norm": torch.ones(8).index_fill(0, torch.tensor([2]), math.nan)})


GRID = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


@pytest.mark.parametrize("knee", [0.8, 0.6, 0.5, 0.3])
@pytest.mark.parametrize("plateau", [0.0, 0.05])
@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_the_knee_of_a_hinge_is_found(knee, plateau, noise):
    g = np.random.default_rng(0)
    loss = {d: plateau * (1 - d) + 2 * max(0.0, knee - d) + noise * g.standard_normal() for d in GRID}
    curve = sparsity_curve(GRID, loss.__getitem__)
    assert curve.knee == knee and curve.ratio > 3


def test_explosive_curves_have_an_early_knee_and_even_ones_none():
    assert 0.2 <= sparsity_curve(GRID, lambda d: math.exp(8 * (1 - d)) / 1000).knee <= 0.5
    assert sparsity_curve(GRID, lambda d: 1 - d).knee is None
    assert sparsity_curve(GRID, lambda d: 0.0).knee is None
    assert sparsity_curve(GRID, lambda d: d).knee is None
    assert sparsity_curve(GRID, lambda d: 1 - d).ratio == 1.0


def test_one_bad_measurement_makes_no_knee():
    loss = {d: 0.1 * (1 - d) + 2 * max(0.0, 0.4 - d) for d in GRID} | {0.8: 0.3}
    assert sparsity_curve(GRID, loss.__getitem__).knee == 0.4


def test_curves_refuse_what_has_no_knee():
    with pytest.raises(BudgetError, match="three densities"):
        sparsity_curve([1.0, 0.5], lambda d: 0.0)
    with pytest.raises(NonFiniteError, match=r"densities \[0.1\]"):
        sparsity_curve(GRID, lambda d: math.inf if d == 0.1 else 0.0)


def test_density_budget_of_the_default_follows_the_pattern():
    assert build("magnitude").budget == Density(0.5)
    assert build("magnitude", pattern="1:4").apply(torch.rand(4, 8), {})[1].density == 0.25
