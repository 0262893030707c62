"""OWL's allocation and RIA's score against naive twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.attach import find
from gossamer.core import get_method
from gossamer.core.allocation import by_outliers
from gossamer.core.budget import count
from gossamer.core.errors import BudgetError, CalibrationError, UnknownName
from gossamer.recipes.outliers import allocate_by_outliers, outlier_shares
from gossamer.score import relative_importance


class Blocks(nn.Module):
    """An input layer and a list of blocks of two layers each; inputs of later blocks have more and more outliers."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(blocks)
        )

    def forward(self, x):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(x * (1 + 40 * i * (torch.arange(16) < i)))
        return x


def model_and_data():
    torch.manual_seed(0)
    return Blocks(), [torch.randn(20, 16) for _ in range(3)]


def naive_shares(model, data, times):
    """Wanda's scores of each block in one heap, weight by weight."""
    seen = {}
    hooks = [
        m.register_forward_hook(lambda _, x, __, n=n: seen.setdefault(n, []).append(x[0].detach()))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    for batch in data:
        model(batch)
    [h.remove() for h in hooks]
    blocks: dict[str, list[str]] = {}
    for name in seen:
        blocks.setdefault(name.rsplit(".", 1)[0] if "blocks" in name else name, []).append(name)
    shares = {}
    for inner in blocks.values():
        heap = []
        for name in inner:
            norm = torch.cat(seen[name]).double().square().mean(0).sqrt()
            heap += (model.get_submodule(name).weight.detach().abs().double() * norm).flatten().tolist()
        bar = times * sum(heap) / len(heap)
        shares |= dict.fromkeys(inner, sum(v > bar for v in heap) / len(heap))
    return shares


@pytest.mark.parametrize("times", [2.0, 5.0])
def test_shares_match_the_naive_count(times):
    model, data = model_and_data()
    got = outlier_shares(model, find(model).targets, data, times=times)
    want = naive_shares(model, data, times)
    assert got == pytest.approx(want, abs=1e-9) and len(set(got.values())) > 2


def test_densities_of_equal_blocks_are_the_official_formula():
    shares, lam = {f"{b}.{i}": s for b, s in enumerate((0.2, 1.7, 0.9)) for i in range(2)}, 0.08
    d = np.array([0.2, 1.7, 0.9])
    ratio = (d - d.min()) * (1 / (d.max() - d.min()) * lam * 2)
    want = ratio - ratio.mean() + 0.3  # as the official code sets them, with 1 - sparsity_ratio = 0.3
    got = by_outliers(shares, dict.fromkeys(shares, 10**6), 0.3, within=lam)
    assert [got[f"{b}.1"] for b in range(3)] == pytest.approx(want.tolist(), abs=1e-6)
    assert got["1.0"] - got["0.0"] == pytest.approx(2 * lam, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5000)), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 0.7),
)
def test_counts_are_exact_and_more_outliers_never_mean_fewer_weights(layers, density, within):
    shares, sizes = ({str(i): pair[j] for i, pair in enumerate(layers)} for j in (0, 1))
    got = by_outliers(shares, sizes, density, within=within)
    counts = {n: round(got[n] * sizes[n]) for n in got}
    assert sum(counts.values()) == count(density, sum(sizes.values()))
    assert all(0 <= got[n] <= 1 for n in got)
    for a in got:
        for b in got:
            slack = 1 / sizes[a] + 1 / sizes[b] + 1e-9
            assert shares[a] > shares[b] or got[a] <= got[b] + slack
            assert abs(got[a] - got[b]) <= 2 * within + slack


def test_prune_spreads_by_outliers():
    model, data = model_and_data()
    shares = outlier_shares(model, find(model).targets, data)
    want = allocate_by_outliers(model, find(model).targets, data, density=0.4)
    report = gossamer.prune(model, "wanda", density=0.4, data=data, allocation="owl", pattern="unstructured")
    got = {r.name: r.density for r in report.layers}
    assert got == pytest.approx(want) and report.density == pytest.approx(0.4, abs=1e-3)
    assert got[max(shares, key=shares.get)] > got[min(shares, key=shares.get)] + 0.1
    assert got["blocks.2.0"] == pytest.approx(got["blocks.2.2"], abs=0.01)  # a block shares one density


def test_refusals():
    model, data = model_and_data()
    with pytest.raises(CalibrationError, match="'owl' measures"):
        gossamer.prune(model, "magnitude", density=0.4, allocation="owl")
    with pytest.raises(BudgetError, match="within"):
        by_outliers({"a": 0.1}, {"a": 5}, 0.5, within=-1)
    with pytest.raises(UnknownName, match="did you mean 'owl'"):
        gossamer.prune(model, "magnitude", density=0.4, allocation="owls", data=data)
    with pytest.raises(BudgetError, match="power"):
        get_method("ria")(power=-1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
def test_ria_weight_by_weight(seed, power, density):
    g = torch.Generator().manual_seed(seed)
    w, norm = torch.randn(5, 12, generator=g), torch.rand(12, generator=g) + 0.1
    size = w.abs().double().numpy()
    want = [
        [(v / size[:, j].sum() + v / size[i].sum()) * float(norm[j]) ** power for j, v in enumerate(row)]
        for i, row in enumerate(size)
    ]
    score = relative_importance(w, {"input_norm": norm}, power=power)
    np.testing.assert_allclose(score.numpy(), want, rtol=1e-5)
    new, support = get_method("ria")(density=density, power=power).apply(w, {"input_norm": norm})
    best = np.argsort(-score.numpy().ravel(), kind="stable")[: math.floor(density * 60 + 0.5)]
    assert set(support.kept.flatten().nonzero().flatten().tolist()) == set(best.tolist())
    assert (new[support.kept] == w[support.kept]).all()


def test_dead_rows_and_columns_are_worth_nothing():
    w = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 1.0]])
    score = relative_importance(w, {"input_norm": torch.ones(3)})
    assert score.isfinite().all() and (score[w == 0] == 0).all() and (score[w != 0] > 0).all()
    conv = w.view(2, 3, 1, 1)
    assert (relative_importance(conv, {"input_norm": torch.ones(3)}).flatten(1) == score).all()
