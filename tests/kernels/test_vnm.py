"""V:N:M from the name to the packed layer: V rows share which N of every M columns they keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core import Keep, Support, get_method, pattern, select, select_regrouped
from gossamer.core.errors import PatternError
from gossamer.deploy import report_of
from gossamer.deploy.structure import detect
from gossamer.formats import RowGrouped
from gossamer.kernels import resolve
from gossamer.kernels.reference import spmm_reference
from gossamer.nn import PackedConv2d

SHAPES = {
    "2:1:4": (6, 12),
    "4:2:8": (12, 24),
    "8:2:4": (16, 20),
    "16:4:16": (32, 48),
    "64:2:8": (128, 40),
    "3:2:5": (9, 15),
}


def numbers(spec: str) -> tuple[int, int, int]:
    v, n, m = map(int, spec.split(":"))
    return v, n, m


def brute_force(scores: torch.Tensor, v: int, n: int, m: int) -> torch.Tensor:
    """Of every V x M block the N columns with the largest sum, by trying all choices."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for top in range(0, scores.shape[0], v):
        for left in range(0, scores.shape[1], m):
            block = scores[top : top + v, left : left + m].double().sum(0)
            best = max(itertools.combinations(range(m), n), key=lambda c: float(block[list(c)].sum()))
            kept[top : top + v, [left + column for column in best]] = True
    return kept


@pytest.mark.parametrize("spec", SHAPES)
def test_selection_is_the_best_of_all_choices(spec):
    v, n, m = numbers(spec)
    scores = torch.rand(SHAPES[spec], generator=torch.Generator().manual_seed(v))
    who = pattern(spec)
    assert (who.kept, who.pool_size) == (n, m)
    assert torch.equal(select(scores, who, Keep(n)).kept, brute_force(scores, v, n, m))


def test_convolutions_choose_input_channels_for_every_tap():
    scores = torch.rand(8, 8, 3, 3)
    kept = select(scores, "4:2:4", Keep(2)).kept
    for y, x in itertools.product(range(3), range(3)):
        assert torch.equal(kept[..., y, x], brute_force(scores[..., y, x], 4, 2, 4))


def test_rows_brought_together_keep_more_and_keep_the_pattern():
    scores = torch.rand(32, 24, generator=torch.Generator().manual_seed(2)) ** 4
    own, moved = (choose(scores, pattern("8:2:4"), Keep(2)) for choose in (select, select_regrouped))
    assert float(scores[moved.kept].sum()) > float(scores[own.kept].sum()) and moved.count == own.count
    w = torch.where(moved.kept, scores, 0.0)
    grouped = RowGrouped.from_dense(w, g=8)
    assert grouped.stored == grouped.nnz and torch.equal(grouped.to_dense(), w)


@pytest.mark.parametrize("spec", SHAPES)
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_every_stored_form_multiplies_as_its_twin(spec, tokens):
    v, n, _ = numbers(spec)
    w = torch.where(select(torch.rand(SHAPES[spec]), spec, Keep(n)).kept, torch.randn(SHAPES[spec]), 0.0)
    found = detect(w)
    groups = {dict(s.options)["g"] for s in found if s.format == "rowgrouped"}
    assert groups == {g for g in (8, 4, 2) if v % g == 0}
    poisoned = torch.full((tokens + 2, w.shape[1]), torch.nan)
    poisoned[1:-1] = x = torch.randn(tokens, w.shape[1])
    for fmt in [RowGrouped.from_dense(w, g=g) for g in groups]:
        assert fmt.nnz == fmt.stored == int((w != 0).sum())
        y = resolve(fmt, backend="cpu").run(poisoned[1:-1], None, "none")
        torch.testing.assert_close(y, spmm_reference(fmt, x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, x @ w.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruned_packed_saved_and_loaded(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    data = None if method == "magnitude" else [torch.randn(16, 32) for _ in range(4)]
    report = gossamer.prune(model, method, pattern="16:2:8", data=data, targets=("0", "2"))
    assert report.density == 0.25
    for layer in (model[0], model[2]):
        blocks = (layer.weight != 0).view(4, 16, -1, 8)
        assert bool((blocks == blocks[:, :1]).all()) and bool((blocks.sum(-1) == 2).all())
    x = torch.randn(40, 32)
    tried = report_of(gossamer.pack(model, x, repeats=1))
    assert all("rowgrouped(g=8)/cpu" in {t.candidate for t in r.trials if t.ms is not None} for r in tried.layers)
    packed = gossamer.pack(model, x, candidates=["rowgrouped(g=8)/cpu"], repeats=1)
    same = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    loaded = gossamer.load(gossamer.save(packed, tmp_path / "m"), model=same)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(x), packed(x))


def test_a_packed_convolution():
    conv = nn.Conv2d(8, 16, 3, padding=1)
    gossamer.prune(conv, "magnitude", pattern="8:2:4", targets=("",))
    packed = PackedConv2d.from_conv(conv, RowGrouped)
    x = torch.randn(2, 8, 9, 17)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), conv(x), rtol=1e-4, atol=1e-5)
    assert packed.refuse() is None and packed.linear.density == 0.5


def test_rows_that_choose_among_shared_columns():
    """VENOM's own pattern nests two choices: columns for V rows, then each row its own among those."""
    scores = torch.rand(16, 24)
    columns = select(scores, "8:4:8", Keep(4))
    support = select(scores, "2:8", Keep(2), within=columns)
    want = torch.zeros(16, 24, dtype=torch.bool)
    for row, left in itertools.product(range(16), range(0, 24, 8)):
        shared = columns.kept[row, left : left + 8].nonzero().flatten() + left
        want[row, shared[scores[row, shared].topk(2).indices]] = True
    assert support <= columns and torch.equal(support.kept, want) and support.density == 0.25
    w = torch.where(support.kept, scores + 0.1, 0.0)
    assert [s.name for s in detect(w)] == ["2:8"]
    assert (
        Support(gossamer.pack(linear(w), torch.randn(9, 24), candidates=["nm/cpu"], repeats=1).weight != 0) == support
    )


def linear(w: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0])
    layer.weight.data = w
    return layer.eval()


def test_what_does_not_fit_is_refused():
    with pytest.raises(PatternError, match="axis 0 has length 10, not a multiple of 4"):
        select(torch.rand(10, 16), "4:2:4", Keep(2))
    with pytest.raises(PatternError, match="axis 1 has length 18, not a multiple of 4"):
        select(torch.rand(8, 18), "4:2:4", Keep(2))
    for wrong in ("4:5:4", "4:0:4", "0:2:4"):
        with pytest.raises(PatternError):
            pattern(wrong)
    with pytest.raises(PatternError, match="1 of 1 layers do not fit"):
        gossamer.prune(nn.Linear(16, 10), get_method("magnitude")(pattern="4:2:4"), targets=("",))
