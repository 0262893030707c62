"""Bitmask products for a few tokens against float64 torch, with poisoned memory around x and infinities in x."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from gossamer.core.errors import DispatchError, FormatError, UnknownName
from gossamer.formats.bitmask import Bitmask
from gossamer.kernels.cpu import decode, target
from gossamer.kernels.cpu.decode import bitmask_matvec

needs_expand = pytest.mark.skipif(target.supports("bitmask") is not None, reason=str(target.supports("bitmask")))
ATOL = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
EXACT = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(decode, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weights(rows, cols, density, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=draw).to(dtype)
    return Bitmask.from_dense(w.masked_fill(torch.rand(rows, cols, generator=draw) >= density, 0))


def run(stored, x, bias=None, activation="none"):
    return bitmask_matvec(stored.bits, stored.offsets, stored.values, stored.rows, stored.cols, x, bias, activation)


def inside_nan(x):
    """The same numbers with NaN in the memory on both sides."""
    whole = torch.full((x.numel() + 160,), torch.nan, dtype=x.dtype)
    view = whole[71 : 71 + x.numel()].view(x.shape)
    return view.copy_(x)


def close(y, x, w, bias, activation="none"):
    exact = EXACT[activation](x.double() @ w.double().T + bias.double())
    size = x.double().abs() @ w.double().abs().T + bias.double().abs() + 1
    assert y.dtype is x.dtype and y.shape == exact.shape
    assert float(((y.double() - exact).abs() / size).max()) < ATOL[y.dtype]


@needs_expand
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 15), (4, 16), (5, 17), (67, 130), (300, 384)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_matches_float64(rows, cols, tokens, dtype, threads):
    for density in (0.0, 0.3, 1.0):
        stored = weights(rows, cols, density, dtype)
        bias = torch.randn(rows)
        for x_dtype in (torch.float32, torch.bfloat16):
            x = inside_nan(torch.randn(tokens, cols).to(x_dtype))
            close(run(stored, x, bias), x, stored.to_dense(), bias)


@needs_expand
@pytest.mark.parametrize("activation", list(EXACT))
@pytest.mark.parametrize("biased", [False, True])
def test_activations(activation, biased, threads):
    stored, x = weights(90, 64, 0.5), torch.randn(3, 64)
    bias = torch.randn(90) if biased else None
    close(run(stored, x, bias, activation), x, stored.to_dense(), torch.zeros(90) if bias is None else bias, activation)


@needs_expand
def test_infinity_under_a_pruned_weight_does_not_spread():
    stored = weights(64, 48, 0.3)
    x = torch.randn(1, 48)
    x[0, 7] = torch.inf
    touched = stored.mask()[:, 7]
    y = run(stored, x)[0]
    assert bool(y[~touched].isfinite().all()) and not bool(y[touched].isfinite().any())


@needs_expand
def test_same_bits_on_every_run_thread_count_and_caller():
    stored, x = weights(700, 200, 0.4), torch.randn(1, 200)
    results = []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        results += [run(stored, x) for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        results += list(pool.map(lambda _: run(stored, x), range(200)))
    assert all(torch.equal(results[0], other) for other in results)


@needs_expand
def test_zero_sizes():
    assert run(weights(5, 8, 0.5), torch.empty(0, 8)).shape == (0, 5)
    assert torch.equal(run(weights(5, 0, 0.5), torch.empty(2, 0), torch.ones(5)), torch.ones(2, 5))
    assert run(weights(0, 8, 0.5), torch.randn(2, 8)).shape == (2, 0)


@needs_expand
def test_wrong_inputs_are_refused_by_name():
    stored = weights(5, 8, 0.5)
    with pytest.raises(FormatError, match="x must be"):
        run(stored, torch.randn(2, 9))
    with pytest.raises(FormatError, match="bias"):
        run(stored, torch.randn(2, 8), torch.randn(4))
    with pytest.raises(FormatError, match="bits"):
        bitmask_matvec(stored.bits[:, :1], stored.offsets, stored.values, 5, 8, torch.randn(1, 8))
    with pytest.raises(UnknownName, match="relu"):
        run(stored, torch.randn(2, 8), None, "rulu")


def test_other_processors_are_told_why(monkeypatch):
    monkeypatch.setattr(target, "features", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(decode, "_kernels", {})
    assert "AVX-512" in target.supports("bitmask") and target.supports("spmm") is None
    with pytest.raises(DispatchError, match="AVX-512"):
        run(weights(5, 8, 0.5), torch.randn(1, 8))


def test_an_unknown_kernel_is_an_error_with_near_names():
    with pytest.raises(UnknownName, match="bitmask"):
        target.supports("bitmusk")
