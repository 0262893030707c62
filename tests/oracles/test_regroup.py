"""Regrouping against the best grouping found by trying them all, and the laws it must keep."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core import Density, Keep, Support, get_method, pattern, regroup, select, select_regrouped
from gossamer.core.errors import PatternError
from gossamer.deploy.structure import detect
from gossamer.formats import RowGrouped, format_from
from gossamer.formats.rowgrouped import alike_first
from gossamer.kernels.dispatch import resolve
from gossamer.kernels.reference import spmm_reference

PATTERNS = ["4-row", "([o] {4}) [i]", "4:2:4", "4x4", "2-row"]


def scores(rows: int, columns: int, seed: int, *, kinds: int = 0) -> torch.Tensor:
    """Skewed scores; with `kinds`, rows that share strong columns stand scattered over the matrix."""
    draw = torch.Generator().manual_seed(seed)
    s = torch.randn(rows, columns, generator=draw).abs() ** 3
    if kinds:
        strong = torch.rand(kinds, columns, generator=draw) < 0.25
        s = s + 20.0 * strong[torch.randperm(rows, generator=draw) % kinds]
    return s


def kept(s: torch.Tensor, support: Support) -> float:
    return float(s[support.kept].sum())


def groupings(rows: list[int], g: int):
    if not rows:
        yield []
        return
    for rest in itertools.combinations(rows[1:], g - 1):
        left = [r for r in rows[1:] if r not in rest]
        for tail in groupings(left, g):
            yield [rows[0], *rest, *tail]


@pytest.mark.parametrize("spec", ["4-row", "([o] {4}) [i]"])
def test_nearly_the_best_of_all_groupings(spec):
    who, found = pattern(spec), []
    for seed in range(4):
        s = scores(8, 12, seed)
        best = max(kept(s[o], select(s[o], who, Density(0.3))) for o in groupings(list(range(8)), 4))
        own = kept(s, select(s, who, Density(0.3)))
        got = kept(s, select_regrouped(s, who, Density(0.3)))
        assert own <= got <= best * (1 + 1e-6)
        found.append((got - own) / (best - own) if best > own else 1.0)
    assert sum(found) / len(found) > 0.4  # pairs are exchanged, so two groups of four can be stuck


@pytest.mark.parametrize("spec", PATTERNS)
def test_never_less_than_in_order_and_the_same_count(spec):
    who, s = pattern(spec), scores(32, 24, 1)
    budget = Keep(who.kept) if who.kept else Density(0.25)
    support = select_regrouped(s, who, budget)
    assert kept(s, support) >= kept(s, select(s, who, budget))
    assert support.count == select(s, who, budget).count
    again = select_regrouped(s, who, budget)
    assert support == again


def test_scattered_kinds_are_found():
    s = scores(64, 64, 3, kinds=16)
    free = kept(s, select(s, "row", Density(0.25)))
    regrouped = kept(s, select_regrouped(s, pattern("4-row"), Density(0.25)))
    in_order = kept(s, select(s, "4-row", Density(0.25)))
    assert in_order < 0.65 * free and regrouped > 0.9 * free


def test_kernels_of_filters_share_one_decision():
    who, s = pattern("([o] {2}) [i] {h w}"), scores(8, 45, 0).view(8, 5, 3, 3)
    support = select_regrouped(s, who, Density(0.4)).kept.flatten(2)
    assert (support == support[..., :1]).all()
    assert sorted(support[..., 0].unique(dim=0, return_counts=True)[1].tolist())[0] >= 2


def test_within_scores_beyond_the_finite_and_half_types():
    s = scores(8, 10, 0)
    inside = Support(torch.rand(8, 10, generator=torch.Generator().manual_seed(0)) < 0.7)
    assert select_regrouped(s, pattern("2-row"), Density(0.5), within=inside) <= inside
    s[3, 4] = torch.inf
    assert select_regrouped(s, pattern("2-row"), Density(0.5)).kept[3, 4]
    s[3, 4], s[5] = 1.0, -torch.inf
    assert not select_regrouped(s, pattern("2-row"), Density(0.5)).kept[5].any()
    assert select_regrouped(scores(8, 10, 0).bfloat16(), pattern("2-row"), Density(0.5)).count == 40


@pytest.mark.parametrize("spec", ["unstructured", "2:4", "filter", "({2} o) [i]"])
def test_patterns_that_tie_no_neighbours_are_refused(spec):
    with pytest.raises(PatternError, match="ties neighbouring rows"):
        regroup(torch.ones(8, 8), pattern(spec), Density(0.5))


def test_methods_prune_and_attach_take_it():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    data = [torch.randn(64, 32)]
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
        model.load_state_dict(net.state_dict())
        report = gossamer.prune(model, method, density=0.25, pattern="4-row", regroup=True, data=data)
        assert report.pattern.endswith("rows regrouped") and abs(report.density - 0.25) < 1e-6
        assert any(f.name.startswith("4-row groups") for f in detect(model[0].weight))
    with pytest.raises(PatternError, match="regrouping needs"):
        gossamer.prune(net, "magnitude", density=0.5, regroup=True)
    handle = gossamer.attach(net, "global_magnitude", density=0.5, pattern="4-row", regroup=True)
    assert abs(handle.density - 0.5) < 0.01


def test_a_solver_gives_each_row_what_it_would_get_in_that_order():
    draw = torch.Generator().manual_seed(0)
    w, x = torch.randn(8, 16, generator=draw), torch.randn(64, 16, generator=draw)
    stats = {"gram": x.T @ x / 64}
    plain = get_method("sparsegpt")(density=0.5, pattern="4-row")
    order = regroup(plain.score(w, stats), plain.pattern, plain.budget)
    new, support = replace(plain, regroup=True).apply(w, stats)
    want, _ = plain.apply(w[order], stats)
    assert torch.equal(new[order], want) and torch.equal(new != 0, support.kept)
    assert not torch.equal(order, torch.arange(8))


def grouped_weight(rows: int, cols: int, g: int, seed: int = 0) -> torch.Tensor:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    whole = rows // g * g
    w[:whole] = torch.where(select_regrouped(w[:whole].abs(), pattern(f"{g}-row"), Density(0.2)).kept, w[:whole], 0.0)
    return w


@pytest.mark.parametrize("rows, cols, g", [(64, 40, 4), (37, 19, 4), (64, 70, 8), (30, 21, 2)])
def test_the_format_finds_stores_and_multiplies_scattered_groups(rows, cols, g):
    w = grouped_weight(rows, cols, g)
    stored = RowGrouped.from_dense(w, g=g)
    again = format_from(stored.meta(), stored.parts())
    assert torch.equal(stored.to_dense(), w) and torch.equal(again.to_dense(), w)
    if rows % g == 0:
        assert stored.stored == int((w != 0).sum()) and stored.order.numel() == rows
        assert detect(w)[0].name == f"{g}-row groups, rows re-ordered" and detect(w)[0].reordered
    x, b = torch.randn(5, cols), torch.randn(rows)
    want = torch.relu(x.double() @ w.double().T + b.double()).float()
    torch.testing.assert_close(spmm_reference(stored, x, b, "relu"), want, atol=1e-4, rtol=1e-4)
    plan = resolve(stored)
    torch.testing.assert_close(plan.run(x, b, "relu"), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(stored.gather(w), stored.values)


def test_accidental_zeros_do_not_hide_groups():
    w = grouped_weight(64, 200, 4)
    where = (w != 0).nonzero()
    w[tuple(where[5])] = 0.0
    assert detect(w)[0].name == "4-row groups, rows re-ordered"
    assert torch.equal(RowGrouped.from_dense(w).to_dense(), w)


def test_rows_that_share_nothing_keep_their_order_and_bad_orders_are_refused():
    w = torch.randn(16, 16) * (torch.rand(16, 16) < 0.3)
    assert alike_first(w != 0, 4).numel() == 0 and detect(w) == ()
    stored = RowGrouped.from_dense(w, order=torch.arange(15, -1, -1))
    assert torch.equal(stored.to_dense(), w)
    for bad in (torch.zeros(16), torch.arange(15)):
        with pytest.raises(gossamer.core.errors.FormatError, match="order"):
            RowGrouped.from_dense(w, order=bad)
    parts = {k: v for k, v in RowGrouped.from_dense(w).parts().items() if k != "order"}
    assert torch.equal(format_from(stored.meta(), parts).to_dense(), w)  # files from before rows had an order


def test_a_packed_model_keeps_its_groups(tmp_path):
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    gossamer.prune(model, "magnitude", density=0.2, pattern="4-row", regroup=True)
    x = torch.randn(16, 40)
    packed = gossamer.pack(model, x, candidates=["rowgrouped/cpu"], repeats=1)
    torch.testing.assert_close(packed(x), model(x), atol=1e-5, rtol=1e-5)
    gossamer.save(packed, tmp_path / "kept")
    again = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    assert torch.equal(gossamer.load(tmp_path / "kept", model=again)(x), packed(x))
    torch.testing.assert_close(gossamer.compile(model, x)(x), model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gossamer.unpack(packed)[0].weight, model[0].weight)
