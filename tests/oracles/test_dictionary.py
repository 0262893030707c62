"""Supports from a dictionary against every dictionary there is, and kernels pruned by patterns from one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core import Density, Keep, get_method, select, select_from_dictionary
from gossamer.core.dictionary import CANDIDATES, dictionary
from gossamer.core.errors import BudgetError, NonFiniteError, PatternError, TargetError
from gossamer.deploy.structure import detect


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).abs() ** 2


def sets(competitors: int, keep: int) -> torch.Tensor:
    members = itertools.combinations(range(competitors), keep)
    return torch.stack([torch.zeros(competitors).index_fill_(0, torch.tensor(m), 1) for m in members])


def test_nearly_the_best_of_all_dictionaries():
    ratios = []
    for seed, (competitors, keep, patterns) in enumerate(itertools.product((4, 5), (2, 3), (1, 2, 3))):
        u_RC = scores(14, competitors, seed=seed)
        worth_RN = u_RC @ sets(competitors, keep).t()
        best = max(
            float(worth_RN[:, list(p)].amax(1).sum())
            for p in itertools.combinations(range(worth_RN.shape[1]), patterns)
        )
        support = select_from_dictionary(u_RC, "r [c]", keep, patterns)
        got = float(u_RC[support.kept].sum())
        assert got <= best * (1 + 1e-5) and len(support.kept.unique(dim=0)) <= patterns
        assert bool((support.kept.sum(1) == keep).all())
        ratios.append(got / best)
    assert min(ratios) > 0.98 and sum(r > 1 - 1e-5 for r in ratios) >= 9


def test_each_pool_takes_the_support_it_likes_most():
    u_RC = scores(50, 9)
    sets_PC = dictionary(u_RC, 4, 6)
    support = select_from_dictionary(u_RC, "r [c]", 4, 6)
    for u_C, kept_C in zip(u_RC, support.kept):
        assert float(u_C[kept_C].sum()) == pytest.approx(max(float(u_C[p].sum()) for p in sets_PC))


def test_more_patterns_keep_more_up_to_free_choice():
    s = scores(24, 16, 3, 3)
    free = float(s[select(s, "o i [h w]", Keep(4)).kept].sum())
    kept = [float(s[select_from_dictionary(s, "o i [h w]", 4, p).kept].sum()) for p in (1, 4, 16, 126)]
    assert kept == sorted(kept) and kept[-1] == pytest.approx(free)
    assert torch.equal(select_from_dictionary(s, "o i [h w]", 4, 126).kept, select(s, "o i [h w]", Keep(4)).kept)


def test_large_pools_choose_among_their_own_supports():
    s = scores(40, 8, 5, 5)
    support = select_from_dictionary(s, "o i [h w]", 8, 4)
    masks = support.kept.flatten(2).flatten(0, 1)
    own = select(s, "o i [h w]", Keep(8)).kept.flatten(2).flatten(0, 1)
    assert len(masks.unique(dim=0)) <= 4 and bool((masks.sum(1) == 8).all())
    assert all(bool((own == m).all(1).any()) for m in masks.unique(dim=0)) and CANDIDATES < 40 * 8 * 8


def test_groups_and_earlier_supports():
    s = scores(8, 6, 3, 3)
    tied = select_from_dictionary(s, "(o {4}) i [h w]", 4, 3).kept.view(2, 4, 6, 9)
    assert bool((tied == tied[:, :1]).all()) and bool((tied.sum(-1) == 4).all())
    within = select(s, "[o i] {h w}", Density(0.5))
    support = select_from_dictionary(s, "o i [h w]", 4, 3, within=within)
    assert support <= within and support.count == 4 * 24
    inside = s[within.kept[..., 0, 0]].flatten(1)
    alone = select_from_dictionary(inside, "r [c]", 4, 3)
    assert float(s[support.kept].sum()) == pytest.approx(float(inside[alone.kept].sum()))


def test_bad_input_is_refused():
    s = scores(4, 9)
    for keep, patterns in ((0, 2), (10, 2), (3, 0)):
        with pytest.raises(BudgetError, match="pools of 9"):
            select_from_dictionary(s, "r [c]", keep, patterns)
    with pytest.raises(NonFiniteError, match="not all finite"):
        select_from_dictionary(s.index_fill(1, torch.tensor(2), torch.inf), "r [c]", 3, 2)
    with pytest.raises(PatternError, match="not a multiple of 3"):
        select_from_dictionary(s, "(r {3}) [c]", 3, 2)
    with pytest.raises(BudgetError, match="at least 1"):
        get_method("kernel_patterns")(taps=0)


@pytest.mark.parametrize(("density", "taps", "each"), [(0.3, 4, 4), (0.1, 2, 2), (0.6, 4, 6), (1.0, 3, 9)])
@pytest.mark.parametrize("group", [1, 4])
def test_kernels_keep_patterns_and_exact_counts(group, density, taps, each):
    w = torch.randn(16, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    new, support = get_method("kernel_patterns")(density=density, taps=taps, patterns=5, group=group).apply(w, {})
    masks = support.kept.flatten(2).flatten(0, 1)
    kernels = masks.any(1)
    assert set(masks.sum(1).tolist()) <= {0, each} and len(masks[kernels].unique(dim=0)) <= 5
    assert abs(support.count - density * w.numel()) <= each * group / 2 + 0.5
    tied = support.kept.view(-1, group, 12, 9)
    assert bool((tied == tied[:, :1]).all())
    assert torch.equal(new, torch.where(support.kept, w, 0.0))


def test_kernels_of_one_tap_compete_one_by_one():
    for w in (torch.randn(8, 6), torch.randn(8, 6, 1, 1)):
        assert get_method("kernel_patterns")(density=0.25).apply(w, {})[1] == select(w.abs(), "[...]", Density(0.25))


def test_a_network_is_pruned_and_its_patterns_are_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 16, 5), nn.Conv1d(16, 8, 3)).eval()
    report = gossamer.prune(model, "kernel_patterns", density=0.2, targets=("0", "1", "2"), taps=2, patterns=4)
    assert report.density == pytest.approx(0.2, abs=0.01)
    names = [detect(m.weight.flatten(1), m.weight[0, 0].numel())[-1].name for m in model]
    assert names[0] == "kernels of 4 patterns" and all(n.startswith("kernels of") for n in names)
    with pytest.raises(TargetError, match="chooses its support once"):
        gossamer.attach(model, "kernel_patterns", density=0.1)


def test_regrouped_filters_keep_more():
    s = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
    s = s * (1 + 0.1 * torch.rand(s.shape, generator=torch.Generator().manual_seed(1)))
    model = nn.Conv2d(6, 16, 3)
    kept = []
    for regroup in (False, True):
        model.weight.data = s.clone()
        gossamer.prune(model, "kernel_patterns", density=0.3, group=4, regroup=regroup, targets=("",))
        kept.append(float(model.weight.detach().abs().sum()))
    assert kept[1] > 1.05 * kept[0]
