"""SparseGPT against its naive twin, against brute-force least squares, and against what it must withstand."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from sparsegpt_naive import naive_sparsegpt

from gossamer.core import Density, Keep, get_method, hard, pattern, select
from gossamer.core.errors import BudgetError, CalibrationError, NonFiniteError, PatternError
from gossamer.methods.weights.sparsegpt import sparsegpt as method
from gossamer.solve import sparsegpt
from gossamer.solve.row_grid import RowGrid


def problem(rows: int, columns: int, *, tokens: int | None = None, seed: int = 0, kind=torch.float64):
    """Weights, and inputs with correlated columns of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=kind) / columns**0.5
    scale = torch.rand(columns, generator=g, dtype=kind) + 0.1
    x = (
        torch.randn(tokens or 4 * columns, columns, generator=g, dtype=kind)
        @ (torch.eye(columns, dtype=kind) + mix)
        * scale
    )
    w = torch.randn(rows, columns, generator=g, dtype=kind)
    return w, x, {"gram": x.T @ x / len(x)}


def loss(w, new, x) -> float:
    return float((x @ (w - new).flatten(1).T).pow(2).sum())


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows, columns", [(24, 64), (1, 16), (13, 300), (40, 129)])
@pytest.mark.parametrize("density", [0.5, 0.2, 0.87])
def test_unstructured_matches_the_naive_procedure(rows, columns, density, kind):
    w, _, stats = problem(rows, columns)
    want = naive_sparsegpt(w, stats["gram"], density=density)
    got, support = sparsegpt(w.to(kind), stats, pattern("unstructured"), Density(density))
    assert ((want != 0) == support.kept).all()
    torch.testing.assert_close(
        got, want.to(kind), rtol=1e-3 if kind == torch.float32 else 1e-9, atol=1e-4 if kind == torch.float32 else 1e-10
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("kept, of", [(2, 4), (4, 8), (1, 4), (3, 8)])
def test_groups_match_the_naive_procedure(kept, of, kind):
    w, _, stats = problem(17, 272)
    want = naive_sparsegpt(w, stats["gram"], group=(kept, of))
    got, support = sparsegpt(w.to(kind), stats, pattern(f"{kept}:{of}"), Keep(kept))
    assert ((want != 0) == support.kept).all()
    torch.testing.assert_close(
        got, want.to(kind), rtol=1e-3 if kind == torch.float32 else 1e-9, atol=1e-4 if kind == torch.float32 else 1e-10
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [None, (2, 4)])
def test_rounding_in_the_same_sweep_matches_the_naive_procedure(bits, group):
    w, _, stats = problem(17, 272)
    want = naive_sparsegpt(w, stats["gram"], group=group, bits=bits)
    who, budget = (pattern("2:4"), Keep(2)) if group else (pattern("unstructured"), Density(0.5))
    got, support = sparsegpt(w, stats, who, budget, bits=bits)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert support.count == w.numel() // 2 and not got[~support.kept].any()
    assert max(len(row.unique()) for row in got) <= 2**bits


def test_one_solve_loses_less_than_rounding_afterwards():
    w, x, stats = problem(24, 96)
    whole, support = sparsegpt(w, stats, pattern("unstructured"), Density(0.8))
    after = torch.stack([RowGrid.of(w.T, 3).rounded(column) for column in whole.T], 1) * support.kept
    together, _ = sparsegpt(w, stats, pattern("unstructured"), Density(0.8), bits=3)
    assert loss(w, whole, x) < loss(w, together, x) < 0.9 * loss(w, after, x)


def test_symmetric_grids_have_as_many_values_on_both_sides():
    w, _, stats = problem(6, 64)
    got, _ = method(density=0.5, bits=8, symmetric=True).apply(w, stats)
    codes = got / (w.abs().amax(1, keepdim=True) / 127)
    assert (codes - codes.round()).abs().max() < 1e-9 and codes.abs().max() <= 127 + 1e-9
    for bits in (1, 9):
        with pytest.raises(BudgetError, match="2 to 8 bits"):
            method(bits=bits)
    dead = torch.zeros_like(w)
    assert not method(bits=4).apply(dead, stats)[0].any()


def brute_force_row(w, h, cut):
    """Remove each cut column in turn; the columns after it are set anew by least squares, those before are frozen."""
    w = w.clone()
    for j in range(len(w)):
        if cut[j]:
            rest = slice(j + 1, None)
            w[rest] += torch.linalg.solve(h[rest, rest], h[rest, j]) * w[j]
            w[j] = 0
    return w


@pytest.mark.parametrize("seed", range(5))
def test_one_row_against_brute_force(seed):
    w, _, stats = problem(1, 6, seed=seed)
    h = stats["gram"] + 0.01 * stats["gram"].diagonal().mean() * torch.eye(6, dtype=torch.float64)
    cost = [float(w[0, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(6)]
    best = sorted(range(6), key=lambda j: -cost[j])[:3]
    got, support = sparsegpt(w, stats, pattern("row"), Density(0.5))
    assert support.kept[0].nonzero().flatten().tolist() == sorted(best)
    torch.testing.assert_close(got[0], brute_force_row(w[0], h, ~support.kept[0]))


@pytest.mark.parametrize("spec", ["unstructured", "row", "2:4", "4:8", "4-row", "4x8", "16:2:8", "[o] i", "filter"])
def test_values_are_obs_for_whatever_support_was_chosen(spec):
    """The support aside: given it, every row must be what brute force makes of it."""
    w, _, stats = problem(16, 144, seed=3)
    budget = Keep(pattern(spec).kept) if pattern(spec).kept else Density(0.5)
    got, support = sparsegpt(w, stats, pattern(spec), budget)
    h = stats["gram"] + 0.01 * stats["gram"].diagonal().mean() * torch.eye(144, dtype=torch.float64)
    for r in (0, 15):
        torch.testing.assert_close(got[r], brute_force_row(w[r], h, ~support.kept[r]), rtol=1e-7, atol=1e-9)


EXPRESSIONS = [
    ("unstructured", (9, 300)),
    ("row", (9, 300)),
    ("4-row", (12, 300)),
    ("4x8", (12, 304)),
    ("4x3", (12, 300)),
    ("[o] i", (9, 140)),
    ("filter", (12, 5, 3, 3)),
    ("channel", (6, 20, 3, 3)),
    ("kernel", (6, 30, 3, 3)),
    ("row", (6, 30, 3, 3)),
    ("([o] 3) i", (9, 20)),
    ("o ([g] 4)", (3, 300)),
    ("o (g [150])", (2, 450)),
    ("o ({b} [30])", (5, 300)),
    ("o [i] {...}", (5, 40, 3, 3)),
]


@pytest.mark.parametrize("spec, shape", EXPRESSIONS)
@pytest.mark.parametrize("d", [0.0, 0.13, 0.77, 1.0])
def test_every_pool_keeps_exactly_its_count(spec, shape, d):
    w, _, stats = problem(shape[0], math.prod(shape[1:]))
    got, support = sparsegpt(w.view(shape), stats, pattern(spec), Density(d))
    won_RCT = pattern(spec).split(support.kept)
    assert (won_RCT == won_RCT[..., :1]).all()
    assert (won_RCT[..., 0].sum(1) == math.floor(d * won_RCT.shape[1] + 0.5)).all()
    assert not got[~support.kept].any() and not got[~support.kept].signbit().any() and got.shape == shape
    if d == 1.0:
        torch.testing.assert_close(got, w.view(shape))


@pytest.mark.parametrize(
    "spec, shape", [("2:4", (5, 8, 3, 3)), ("3:5", (4, 300)), ("8:2:8", (16, 136)), ("4:32", (3, 160))]
)
def test_groups_keep_n_of_m_even_where_blocks_do_not_divide(spec, shape):
    w, _, stats = problem(shape[0], math.prod(shape[1:]))
    who = pattern(spec)
    _, support = sparsegpt(w.view(shape), stats, who, Keep(who.kept))
    won_RCT = who.split(support.kept)
    assert (won_RCT[..., 0].sum(1) == who.kept).all() and (won_RCT == won_RCT[..., :1]).all()


@pytest.mark.parametrize("spec", ["unstructured", "row", "2:4", "4-row", "4x8"])
def test_reconstruction_beats_masking_on_held_out_inputs(spec):
    w, x, _ = problem(32, 128, tokens=4000)
    seen, unseen = x[:3000], x[3000:]
    who = pattern(spec)
    new, support = method(pattern=spec).apply(w, {"gram": seen.T @ seen / len(seen)})
    wanda = get_method("wanda")(pattern=spec).apply(w, {"input_norm": seen.pow(2).mean(0).sqrt().float()})[0]
    by_magnitude = hard(w, select(w.abs(), who, Keep(who.kept) if who.kept else Density(0.5)))
    assert loss(w, new, unseen) < 0.95 * loss(w, hard(w, support), unseen)
    assert loss(w, new, unseen) < 0.95 * loss(w, wanda, unseen)
    assert loss(w, new, unseen) < 0.95 * loss(w, by_magnitude, unseen)


def test_no_worse_than_the_official_threshold():
    """On a layer as large as real ones, the exact count costs nothing: the loss agrees to a per mille."""
    w, x, stats = problem(96, 256)
    ours = loss(w, sparsegpt(w, stats, pattern("unstructured"), Density(0.5))[0], x)
    assert ours <= loss(w, naive_sparsegpt(w, stats["gram"], threshold=True), x) * 1.001


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_any_block_width_is_exact_in_values(block):
    w, _, stats = problem(8, 64, seed=5)
    got, support = sparsegpt(w, stats, pattern("2:4"), Keep(2), block=block)
    want, same = sparsegpt(w, stats, pattern("2:4"), Keep(2))
    assert support == same
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_half_types_keep_their_type(kind):
    w, x, stats = problem(8, 32)
    got, support = method().apply(w.to(kind), {"gram": stats["gram"].float()})
    assert got.dtype == kind and support.count == 128
    assert loss(w, got.double(), x) < 0.95 * loss(w, hard(w, support), x)


def test_layouts_do_not_matter():
    w, _, stats = problem(8, 32)
    want = method().apply(w, stats)[0]
    assert (method().apply(w.t().contiguous().t(), stats)[0] == want).all()
    wide = torch.zeros(8, 64, dtype=w.dtype)
    wide[:, ::2] = w
    assert (method().apply(wide[:, ::2], stats)[0] == want).all()


def test_the_weight_is_not_changed_in_place():
    w, _, stats = problem(4, 16)
    before = w.clone()
    method().apply(w, stats)
    assert (w == before).all()


def test_dead_inputs_lose_first_and_all_zero_rows_pass():
    w, x, _ = problem(6, 32)
    x[:, 5] = 0
    w[2] = 0
    got, support = method(density=0.5, pattern="row").apply(w, {"gram": x.T @ x / len(x)})
    assert not got[:, 5].any() and not got[2].any() and got.isfinite().all()
    assert (support.kept.sum(1) == 16).all() and not support.kept[[0, 1, 3, 4, 5], 5].any()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1), (1, 8), (8, 1)])
def test_thin_and_empty_layers(shape):
    w = torch.ones(shape)
    got, support = method(density=0.5).apply(w, {"gram": torch.eye(shape[1])})
    assert got.shape == shape and support.count == math.floor(0.5 * w.numel() + 0.5)


def test_few_tokens_are_enough_thanks_to_damping():
    w, x, stats = problem(8, 64, tokens=5)
    got, _ = method().apply(w, stats)
    assert got.isfinite().all() and loss(w, got, x) < loss(w, hard(w, method().apply(w, stats)[1]), x)


def test_an_indefinite_hessian_raises_damping_and_says_so(caplog):
    w, _, stats = problem(4, 16)
    low = torch.linalg.eigvalsh(stats["gram"])[0]
    shifted = stats["gram"] - (low + 0.05 * stats["gram"].diagonal().mean()) * torch.eye(16, dtype=w.dtype)
    with caplog.at_level(logging.WARNING, logger="gossamer"):
        got, _ = method().apply(w, {"gram": shifted})
    assert "raising it" in caplog.text and got.isfinite().all()


def test_hopeless_hessians_are_refused_by_name():
    w = torch.ones(4, 16)
    with pytest.raises(CalibrationError, match="not positive definite even at damping"):
        method().apply(w, {"gram": -torch.eye(16)})
    with pytest.raises(CalibrationError, match="all 16 inputs of this layer were 0"):
        method().apply(w, {"gram": torch.zeros(16, 16)})
    broken = torch.eye(16)
    broken[3, 3] = math.nan
    with pytest.raises(NonFiniteError, match="'gram' has 1 NaN or infinite"):
        method().apply(w, {"gram": broken})
    with pytest.raises(NonFiniteError, match="the weight has 64"):
        method().apply(w * math.inf, {"gram": torch.eye(16)})
    with pytest.raises(CalibrationError, match="'gram' is missing"):
        method().apply(w, {})
    with pytest.raises(CalibrationError, match=r"needs \(16, 16\)"):
        method().apply(w, {"gram": torch.eye(8)})


def test_options_out_of_range_are_refused():
    with pytest.raises(BudgetError, match="damping"):
        method(damping=0)
    with pytest.raises(BudgetError, match="leave one of the two out"):
        method(density=0.3, pattern="2:4")
    with pytest.raises(PatternError, match="leave within= out"):
        w, _, stats = problem(4, 8)
        method().apply(w, stats, within=select(w, "row", Keep(2)))
