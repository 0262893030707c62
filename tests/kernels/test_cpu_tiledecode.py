"""Tile bitmask products for a few tokens against float64 torch, with poisoned memory around x and infinities in x."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from gossamer.core.errors import DispatchError, FormatError, UnknownName
from gossamer.formats.tilebitmask import TileBitmask
from gossamer.kernels.cpu import decode, target, tiledecode
from gossamer.kernels.cpu.memory import large_pages
from gossamer.kernels.cpu.tiledecode import TileProduct

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
    return TileBitmask.from_dense(w.masked_fill(torch.rand(rows, cols, generator=draw) >= density, 0))


def run(stored, x, bias=None, activation="none"):
    return TileProduct.of(stored)(x, bias, activation)


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
@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 15), (16, 16), (17, 33), (67, 130), (64, 48), (300, 385)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_matches_float64(rows, cols, tokens, dtype, threads):
    for density in (0.0, 0.1, 0.6, 1.0):
        stored = weights(rows, cols, density, dtype)
        bias = torch.randn(rows)
        for x_dtype in (torch.float32, torch.bfloat16):
            x = inside_nan(torch.randn(tokens, cols).to(x_dtype))
            close(run(stored, x, bias), x, stored.to_dense(), bias)


@needs_expand
def test_sparse_and_dense_tiles_take_the_loads_they_need():
    assert TileProduct.of(weights(64, 64, 0.1)).most == 16
    assert TileProduct.of(weights(64, 64, 0.9)).most == 32
    assert TileProduct.of(weights(64, 64, 1.0)).most == 0 and TileProduct.of(weights(63, 64, 1.0)).most == 32


@needs_expand
@pytest.mark.parametrize("activation", list(EXACT))
@pytest.mark.parametrize("biased", [False, True])
def test_activations(activation, biased, threads):
    stored, x = weights(90, 64, 0.5), torch.randn(3, 64)
    bias = torch.randn(90) if biased else None
    close(run(stored, x, bias, activation), x, stored.to_dense(), torch.zeros(90) if bias is None else bias, activation)


@needs_expand
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("at", [7, 46])
def test_infinity_under_a_pruned_weight_does_not_spread(dtype, value, at):
    stored = weights(64, 47, 0.3, dtype)
    x = torch.randn(1, 47).to(dtype)
    x[0, at] = value
    touched = stored.mask()[:, at]
    y = run(stored, x)[0]
    assert bool(y[~touched].isfinite().all()) and not bool(y[touched].isfinite().any())


@needs_expand
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_on_every_run_thread_count_and_caller(dtype):
    stored, x = weights(700, 200, 0.4, dtype), torch.randn(1, 200).to(dtype)
    product, results = TileProduct.of(stored), []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        results += [product(x) for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        results += list(pool.map(lambda _: product(x), range(200)))
    assert all(torch.equal(results[0], other) for other in results)


@needs_expand
def test_processors_without_the_dot_product_go_through_float32(monkeypatch):
    stored, x = weights(70, 96, 0.5, torch.bfloat16), torch.randn(2, 96).bfloat16()
    assert tiledecode.dots(stored, 2) == ({"avx512bf16", "avx512vbmi2"} <= target.features())
    fast = run(stored, x)
    monkeypatch.setattr(tiledecode, "features", lambda: frozenset({"avx512f"}))
    assert not tiledecode.dots(stored, 2)
    torch.testing.assert_close(run(stored, x), fast, atol=0.05, rtol=0.02)
    close(run(stored, x), x, stored.to_dense(), torch.zeros(70))


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
    with pytest.raises(FormatError, match="convert"):
        run(stored, torch.randn(2, 8).double())
    with pytest.raises(FormatError, match="bias"):
        run(stored, torch.randn(2, 8), torch.randn(4))
    with pytest.raises(FormatError, match="float64"):
        run(TileBitmask.from_dense(torch.ones(2, 2, dtype=torch.float64)), torch.ones(1, 2))
    with pytest.raises(UnknownName, match="relu"):
        run(stored, torch.randn(2, 8), None, "rulu")


def test_other_processors_are_told_why(monkeypatch):
    monkeypatch.setattr(target, "features", lambda: frozenset({"avx2", "fma"}))
    tiledecode.kernel_for.cache_clear()
    with pytest.raises(DispatchError, match="AVX-512"):
        run(weights(5, 8, 0.5), torch.randn(1, 8))


def test_large_pages_are_a_wish_that_changes_nothing():
    big = torch.arange(3 << 20)
    large_pages(big, torch.empty(0))
    assert torch.equal(big, torch.arange(3 << 20))
