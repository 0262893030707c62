"""The kernel that ranks a few competitors against `select`: odd shapes, ties, poison around, both thread counts."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.attach import by_kernel
from gossamer.attach.choose import choose_both
from gossamer.core import Density, Keep, Pattern, Sparsifier, select
from gossamer.core.errors import FormatError, NonFiniteError
from gossamer.core.pattern import pattern as read
from gossamer.kernels.cpu import few
from gossamer.kernels.cpu.few import best_of_few, plan_best_of_few
from gossamer.score import magnitude


@pytest.fixture(autouse=True)
def wake_threads_and_tasks_for_any_work(monkeypatch):
    monkeypatch.setattr(few, "GRAIN", 1)
    monkeypatch.setattr(few, "_EACH", 64)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from((1, 2)),
    st.integers(1, 70),
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from((1, 1, 2, 9, 16, 37)),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_same_winners_as_select(threads, blocks, size, columns, kept, absolute, ties, seed):
    scores = torch.randn(blocks, size, columns, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if ties else scores
    winners = torch.full((scores.numel() + 128,), 7, dtype=torch.uint8)
    plan = plan_best_of_few(blocks, size, columns, kept, absolute=absolute, threads=threads)
    plan.run(scores.data_ptr(), winners.data_ptr() + 64)
    got, around = winners[64:-64].view(scores.shape), torch.cat([winners[:64], winners[-64:]])
    want = select(scores.abs() if absolute else scores, Pattern("a [m] b"), Keep(kept)).kept
    assert torch.equal(got, want.to(torch.uint8)) and bool((around == 7).all())


def chosen(sparsifier, w):
    return choose_both(sparsifier, w, {}, 0)[0]


def test_what_it_cannot_read_is_refused():
    with pytest.raises(FormatError, match=r"scores must be a contiguous float32 CPU tensor"):
        best_of_few(torch.ones(2, 4, 1, dtype=torch.float64), 2)
    with pytest.raises(FormatError, match="ranks 2 to 8 competitors"):
        best_of_few(torch.ones(2, 9, 1), 2)
    with pytest.raises(FormatError, match="got 5 of 4"):
        best_of_few(torch.ones(2, 4, 1), 5)
    assert best_of_few(torch.ones(0, 4, 3), 2).shape == (0, 4, 3)


def test_winners_lie_on_the_cpu_whatever_the_default_device_is():
    scores = torch.rand(5, 4, 3)
    with torch.device("meta"):
        got = best_of_few(scores, 2)
    assert torch.equal(got, select(scores, Pattern("a [m] b"), Keep(2)).kept)


RULES = {
    "2:4": ("2:4", Keep(2)),
    "along the outputs": ("(g [8]) ...", Keep(2)),
    "all of three": ("(g [3]) ...", Keep(7)),
    "tied rows": ("(o {3}) (g [4]) ...", Keep(2)),
    "two axes compete": ("o (g [4]) [h] ...", Keep(2)),
    "by density": ("o (g [4]) ...", Density(0.5)),
    "many": ("o (g [12]) ...", Keep(2)),
}


def itself(w, stats):
    return w


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", [magnitude, itself])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_handle_chooses_what_its_sparsifier_would(rule, score, dtype, monkeypatch):
    monkeypatch.setattr(by_kernel, "SMALL", 1)
    pattern, budget = RULES[rule]
    sparsifier = Sparsifier(score, read(pattern), budget, backward=read("(g [4]) ..."))
    whole = torch.randn(24, 24, 3, 3).to(dtype)
    for w in (whole, whole[:, ::2]):  # the second is not in one piece
        scores = score(w, {})
        kept, back = choose_both(sparsifier, w, {}, 0)
        assert kept == sparsifier.choose(scores) and back == select(scores, sparsifier.backward, budget)


def test_scores_without_a_rank_are_refused_and_infinite_ones_ranked_as_ever(monkeypatch):
    monkeypatch.setattr(by_kernel, "SMALL", 1)
    sparsifier = Sparsifier(itself, read("2:4"), Keep(2))
    scores = torch.rand(8, 8)
    scores[0, :3] = -torch.inf
    got = chosen(sparsifier, scores)
    assert got == sparsifier.choose(scores) and not got.kept[0, :3].any()
    with pytest.raises(NonFiniteError, match="NaN"):
        chosen(sparsifier, scores * torch.nan)


def test_where_nothing_can_be_compiled_torch_chooses_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(by_kernel, "SMALL", 1)
    monkeypatch.setattr("gossamer.kernels.cpu.trial.cannot_compile", lambda: "its compiler is away")
    by_kernel.refusal.cache_clear()
    sparsifier, scores = Sparsifier(magnitude, read("2:4"), Keep(2)), torch.rand(8, 8)
    with caplog.at_level("INFO", logger="gossamer"):
        assert chosen(sparsifier, scores) == sparsifier.choose(scores)
    by_kernel.refusal.cache_clear()
    assert "its compiler is away" in caplog.text
