"""The kernel that sets zeros against its twin: odd sizes, NaN around, both thread counts, what it cannot read."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.attach import by_kernel
from gossamer.core.cut import add_where_, cut, cut_, faded
from gossamer.kernels.cpu import cutting
from gossamer.kernels.cpu.cutting import cut_by_kernel, plan_cut
from gossamer.kernels.cpu.tokens import float_bits


@pytest.fixture(autouse=True)
def wake_threads_and_tasks_for_any_work(monkeypatch):
    monkeypatch.setattr(cutting, "GRAIN", 1)
    monkeypatch.setattr(cutting, "_EACH", 96)


def drawn(count, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=draw)
    x[torch.rand(count, generator=draw) < 0.2] = math.nan
    x[torch.rand(count, generator=draw) < 0.2] = -0.0
    return x, torch.rand(count, generator=draw) < 0.3


def bits(x):
    return x.view(torch.int32)


WANT = {
    "cut": lambda x, kept, y: torch.where(kept, x, torch.zeros(())),
    "fade": lambda x, kept, y: torch.where(kept, x, x * 0.3),
    "add": lambda x, kept, y: torch.where(kept, y.double() + 0.3 * x.double(), y.double()).float(),
}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from((1, 2)), st.sampled_from(tuple(WANT)), st.integers(0, 700), st.integers(0, 99))
def test_bit_for_bit_as_its_twin(threads, form, count, seed):
    x, kept = drawn(count, seed)
    whole = torch.full((count + 32,), math.nan)
    y = whole[16 : 16 + count]
    y.copy_(torch.randn(count, generator=torch.Generator().manual_seed(seed)) if form == "add" else math.nan)
    want = WANT[form](x, kept, y)
    plan_cut(count, form, threads=threads).run(x.data_ptr(), kept.data_ptr(), y.data_ptr(), float_bits(0.3))
    if form == "add":  # 0.3 of a float32 is not 0.3 of a float64
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-7, equal_nan=True)
        assert torch.equal(bits(y)[~kept], bits(want)[~kept])
    else:
        assert torch.equal(bits(y), bits(want))
    assert whole[:16].isnan().all() and whole[16 + count :].isnan().all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from((1, 2)), st.integers(0, 700), st.integers(0, 99))
def test_zeros_in_place(threads, count, seed):
    x, kept = drawn(count, seed)
    whole = torch.full((count + 32,), math.nan)
    y = whole[16 : 16 + count].copy_(x)
    for _ in range(2):  # the second time everything is right already
        plan_cut(count, "clear", threads=threads).run(y.data_ptr(), kept.data_ptr(), y.data_ptr(), 0)
        assert torch.equal(bits(y), bits(WANT["cut"](x, kept, y)))
    assert whole[:16].isnan().all() and whole[16 + count :].isnan().all()


def test_a_write_is_seen_by_autograd():
    x, kept = drawn(100, 0)
    for form in ("clear", "add"):
        before = x._version
        assert cut_by_kernel(form, x, kept, x) and x._version > before


@pytest.mark.parametrize(
    "turn", [lambda x: x.double(), lambda x: x.view(10, 10).t(), lambda x: x[::2], lambda x: x.view(10, 10)[:, :5]]
)
def test_what_it_cannot_read_is_left_alone(turn):
    x, kept = drawn(100, 0)
    x, kept = turn(x), turn(kept.float()).bool()
    before = x.clone()
    assert not cut_by_kernel("clear", x, kept, x) and torch.equal(x.nan_to_num(), before.nan_to_num())


def test_minus_signs_that_stand_beside_the_memory_are_not_overlooked():
    x, kept = torch._neg_view(torch.ones(100)), torch.arange(100) % 2 == 0
    assert not cut_by_kernel("cut", x, kept, torch.empty(100))
    assert torch.equal(cut(x, kept), -kept.float())


@pytest.mark.parametrize("other", [torch.int32, torch.float32, torch.uint8])
def test_only_a_mask_of_bools_is_read(other):
    x, kept = drawn(100, 0)
    assert not cut_by_kernel("cut", x, kept.to(other), torch.empty(100))


@pytest.mark.parametrize("refused", [None, "its compiler is away"])
def test_what_cut_writes_does_not_depend_on_the_kernel(refused, monkeypatch):
    monkeypatch.setattr(by_kernel, "SMALL", 1)
    monkeypatch.setattr(by_kernel, "refusal", lambda: refused)
    w, kept = drawn(300, 1)
    w = w.nan_to_num().requires_grad_()
    got = cut(w, kept)
    (by_w,) = torch.autograd.grad(got.pow(2).sum(), w)
    assert torch.equal(got, torch.where(kept, w, torch.zeros(()))) and torch.equal(by_w, torch.where(kept, 2 * w, 0))
    assert torch.equal(cut_(w, kept), got)
    other = torch.randn(300)
    assert torch.equal(faded(w.detach(), kept, 0.3), torch.where(kept, w, 0.3 * w))
    want = other + torch.where(kept, 0.3 * w.detach(), 0)
    torch.testing.assert_close(add_where_(other, w.detach(), kept, 0.3), want, rtol=1e-6, atol=1e-7)
