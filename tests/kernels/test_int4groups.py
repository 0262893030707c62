"""4-bit groups: the error law, exact bytes, refusals, and products against float64 torch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from gossamer.core.errors import DispatchError, FormatError, UnknownName
from gossamer.formats import Int4Groups, format_from
from gossamer.kernels.cpu import decode, int4decode, target
from gossamer.kernels.cpu.int4decode import Int4Product

needs_dot = pytest.mark.skipif(target.supports("int4groups") is not None, reason=str(target.supports("int4groups")))


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(decode, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrix(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows, cols", [(0, 16), (3, 0), (1, 16), (7, 48), (16, 256), (5, 2064)])
@pytest.mark.parametrize("density", [None, 0.0, 0.3, 0.5])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_every_kept_weight_comes_back_within_half_a_step(rows, cols, density, shift):
    w = matrix(rows, cols) + shift
    stored = Int4Groups.from_dense(w, density=density)
    back, kept = stored.to_dense(), torch.zeros(stored.grid, dtype=torch.bool)
    kept.view(-1)[stored.slots().view(-1)] = True
    kept = kept[:, :cols]
    steps = stored.values[:, 1].float()[:, None, None].expand(-1, 8, 16)
    step = torch.zeros(stored.grid).view(-1).scatter_(0, stored.slots().view(-1), steps.reshape(-1))
    error = (back - w).abs() - step.view(stored.grid)[:, :cols] / 2 * (1 + 1e-5) - 1e-5
    assert not bool((error > 0)[kept].any()) and not bool(back[~kept].any())
    assert stored.nnz == int(kept.sum())
    if density is not None and rows and cols:
        groups = cols // 16
        assert kept.view(rows, groups, 16).all(-1).sum(1).eq(min(groups, int(density * groups + 0.5))).all()


def test_the_best_groups_are_kept():
    w = matrix(4, 64)
    w[:, 16:32] *= 10
    assert Int4Groups.from_dense(w, density=0.25).to_dense()[:, 16:32].ne(0).any(1).all()
    worth = torch.zeros(4, 64)
    worth[:, 48:] = 1
    kept = Int4Groups.from_dense(w, density=0.25, saliency=worth).to_dense() != 0
    assert not bool(kept[:, :48].any()) and bool(kept[:, 48:].any(1).all())


def test_negative_zeros_that_a_mask_leaves_keep_no_group():
    w = matrix(4, 64) * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat_interleave(16)
    assert Int4Groups.from_dense(w).density == 0.5


def test_constant_and_tiny_ranges():
    assert torch.equal(Int4Groups.from_dense(torch.full((2, 32), 0.5)).to_dense(), torch.full((2, 32), 0.5))
    odd = Int4Groups.from_dense(torch.full((1, 16), 0.1))
    assert float((odd.to_dense() - 0.1).abs().max()) <= float(odd.values[0, 1]) / 2 + 1e-7


def test_codes_are_where_the_kernel_looks():
    w = torch.zeros(1, 16)
    w[0, 5], w[0, 15] = 15.0, 1.0
    stored = Int4Groups.from_dense(w)
    # Code 5 is nibble 1 of word 1, code 15 nibble 3 of word 3.
    assert stored.codes[0, :8].tolist() == [0, 0, 0xF0, 0, 0, 0, 0, 0x10]
    assert stored.values.tolist() == [[0.0, 1.0]] and stored.indices.tolist() == [[0] + 7 * [4]]


def test_parts_round_trip_and_bytes():
    stored = Int4Groups.from_dense(matrix(9, 320), density=0.5)
    again = format_from(stored.meta(), stored.parts())
    assert torch.equal(again.to_dense(), stored.to_dense())
    assert stored.nbytes == 84 * 9 * 2 + 4 * 10 and stored.density == 0.5
    assert Int4Groups.from_dense(matrix(64, 512)).nbytes == 84 * 64 * 4 + 4 * 65


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4e38])
def test_weights_that_have_no_scale_are_refused(value):
    w = matrix(4, 32)
    w[2, 3], w[2, 4] = value, -1e38
    with pytest.raises(FormatError, match=r"finite|overflows"):
        Int4Groups.from_dense(w)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("values", lambda part: part * torch.nan),
        ("values", lambda part: -part),
        ("values", lambda part: part.float()),
        ("indices", lambda part: (part.int() + 1).to(torch.uint16)),
        ("indices", lambda part: (part.int() + 400).to(torch.uint16)),
        ("codes", lambda part: part[:, 1:]),
        ("indptr", lambda part: part.flip(0)),
    ],
)
def test_damaged_parts_are_refused(part, change):
    stored = Int4Groups.from_dense(matrix(5, 64).abs())
    with pytest.raises(FormatError):
        format_from(stored.meta(), stored.parts() | {part: change(stored.parts()[part])})


def test_widths_that_are_no_groups_are_refused():
    with pytest.raises(FormatError, match="pad"):
        Int4Groups.from_dense(matrix(2, 17))


def inside_nan(x):
    whole = torch.full((x.numel() + 160,), torch.nan, dtype=x.dtype)
    return whole[71 : 71 + x.numel()].view(x.shape).copy_(x)


@needs_dot
@pytest.mark.parametrize("rows, cols", [(1, 16), (5, 48), (67, 128), (70, 400), (33, 1024)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("density", [None, 0.5, 0.0])
def test_products_match_float64(rows, cols, tokens, density, threads):
    stored, bias = Int4Groups.from_dense(matrix(rows, cols) + 0.3, density=density), torch.randn(rows)
    for dtype in (torch.float32, torch.bfloat16):
        x = inside_nan(torch.randn(tokens, cols).to(dtype))
        y = Int4Product.of(stored)(x, bias, "silu")
        rounded, w = x.bfloat16().double(), stored.to_dense().double()
        exact = functional.silu(rounded @ w.T + bias.double())
        size = rounded.abs() @ w.abs().T + bias.double().abs() + 1
        assert y.dtype is dtype
        assert float(((y.double() - exact).abs() / size).max()) < (4e-6 if dtype is torch.float32 else 8e-3)


@needs_dot
def test_whole_rows_skip_the_indices():
    assert Int4Product.of(Int4Groups.from_dense(matrix(4, 256))).whole
    assert not Int4Product.of(Int4Groups.from_dense(matrix(4, 64))).whole
    assert not Int4Product.of(Int4Groups.from_dense(matrix(4, 256), density=0.5)).whole


@needs_dot
def test_infinity_under_a_dropped_group_does_not_spread():
    w = matrix(20, 256)
    w[::2, 32:48] = 0
    x = torch.randn(1, 256)
    x[0, 40] = torch.inf
    y = Int4Product.of(Int4Groups.from_dense(w))(x)[0]
    assert bool(y[::2].isfinite().all()) and not bool(y[1::2].isfinite().any())


@needs_dot
def test_same_bits_for_every_caller():
    product, x = Int4Product.of(Int4Groups.from_dense(matrix(300, 256), density=0.5)), torch.randn(1, 256)
    first = product(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(first, other) for other in pool.map(lambda _: product(x), range(100)))


@needs_dot
def test_wrong_inputs_are_refused_by_name():
    product = Int4Product.of(Int4Groups.from_dense(matrix(5, 32)))
    with pytest.raises(FormatError, match="x must be"):
        product(torch.randn(2, 33))
    with pytest.raises(FormatError, match="convert"):
        product(torch.randn(2, 32).double())
    with pytest.raises(FormatError, match="bias"):
        product(torch.randn(2, 32), torch.randn(4))
    with pytest.raises(UnknownName, match="relu"):
        product(torch.randn(2, 32), None, "rulu")


def test_other_processors_are_told_why(monkeypatch):
    monkeypatch.setattr(target, "features", lambda: frozenset({"avx512f"}))
    int4decode.kernel_for.cache_clear()
    with pytest.raises(DispatchError, match="dot product"):
        Int4Product.of(Int4Groups.from_dense(matrix(5, 32)))(torch.randn(1, 32))
