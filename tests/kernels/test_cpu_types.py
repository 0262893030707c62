"""Sparse products on bfloat16 and 8-bit panels against their twins: odd shapes, poison around, both thread counts."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d

from gossamer.core.errors import FormatError, UnknownName
from gossamer.formats import CSR, RowGrouped
from gossamer.kernels.cpu import narrow_panels
from gossamer.kernels.cpu.narrow import narrow
from gossamer.kernels.cpu.narrow_conv import Bordered, narrow_convolution, plan_narrow_convolution
from gossamer.kernels.cpu.quantise import Quantised, plan_quantise, quantise_panels
from gossamer.kernels.cpu.spmm_panels import plan_panels, spmm_panels
from gossamer.kernels.reference import panels_reference
from gossamer.kernels.reference.quantised import quantise_reference, quantised_reference
from gossamer.nn import PackedLinear
from tests.kernels.test_cpu_spmm import threads, weights  # noqa: F401
from tests.kernels.test_cpu_targets import ON_X86, child

# Half a unit in the last place of eight bits, and what float32 sums add.
LIMITS = {torch.bfloat16: 2.0**-8, torch.float32: 3e-6}


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(narrow_panels, "GRAIN", 1)


def stored(rows, cols, g, density, seed=0, dtype=torch.bfloat16):
    """Random weights whose groups of g rows share their columns."""
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.rand(-(-rows // g), cols, generator=draw) < density).repeat_interleave(g, 0)[:rows]
    return RowGrouped.from_dense(torch.randn(rows, cols, generator=draw).to(dtype), mask, g=g)


def guarded(*shape, dtype=torch.bfloat16):
    """Panels of NaN with two cache lines of NaN on either side."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 128,), torch.nan, dtype=dtype)
    return whole[64:-64].view(shape), (whole[:64], whole[-64:])


def within(got, fmt, x, bias, activation):
    """The twin's sums, to the rounding of sums of this size."""
    want = panels_reference(fmt, x, bias, activation, torch.float32)
    size = torch.einsum("mk,pkw->pmw", fmt.to_dense().float().abs(), x.float().abs()) + 1
    allowed = LIMITS[got.dtype] * want.abs() + LIMITS[torch.float32] * size
    return bool(((got.float() - want).abs() <= allowed).all())


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 120), st.integers(1, 3), st.integers(1, 150)),
    st.sampled_from((1, 4)),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.sampled_from(("relu", "gelu")),
    st.sampled_from(tuple(LIMITS)),
    st.integers(1, 2),
)
def test_any_shape_matches_the_twin_inside_poison(size, g, density, activation, dtype, workers):
    rows, cols, panels, used = size
    width = -(-used // 32) * 32
    fmt, bias = stored(rows, cols, g, density), torch.randn(rows)
    x, _ = guarded(panels, cols, width)
    x[..., :used] = torch.randn(panels, cols, used)
    y, sides = guarded(panels, rows, width, dtype=dtype)
    plan = plan_panels(
        narrow(fmt), panels=panels, width=width, used=used, activation=activation, out_dtype=dtype, threads=workers
    )
    plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    assert within(y[..., :used], fmt, x[..., :used], bias, activation)
    assert all(bool(side.isnan().all()) for side in sides)
    assert bool(y[..., -(-used // 16) * 16 :].isnan().all())


@pytest.mark.parametrize("g", [1, 2, 4, 8])
@pytest.mark.parametrize("used", [16, 31, 48, 64, 80, 96, 196])
def test_every_tile_width(g, used, threads):  # noqa: F811
    fmt = stored(70, 90, g, 0.3)
    x = torch.randn(2, 90, -(-used // 32) * 32).bfloat16()
    assert within(spmm_panels(narrow(fmt), x, None, "relu", used=used)[..., :used], fmt, x[..., :used], None, "relu")


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu", "relu6", "hard_swish"])
def test_other_activations(activation):
    fmt, bias, x = stored(20, 30, 4, 0.5), torch.randn(20), torch.randn(1, 30, 64).bfloat16()
    assert within(spmm_panels(narrow(fmt), x, bias, activation), fmt, x, bias, activation)


def test_pairs_hold_every_entry_once_and_halves_of_the_odd_ones():
    fmt = stored(20, 50, 4, 0.4)
    weight, again = narrow(fmt), torch.zeros(5, 4, 50)
    for group, (s, e) in enumerate(zip(weight.starts_G, weight.starts_G[1:])):
        for run in range(s, e):
            for lane in range(2):
                again[group, :, int(weight.indices_Rd[run, lane])] += weight.values_Rgd[run, :, lane].float()
    assert torch.equal(again.view(20, 50), fmt.to_dense().float())
    assert torch.equal(weight.starts_G.diff(), (fmt.indptr.diff() + 1) // 2)


def test_rows_in_csr_and_wide_indices():
    fmt = CSR.from_dense(torch.where(torch.rand(9, 70_000) < 1e-3, torch.randn(9, 70_000), 0.0).bfloat16())
    weight, x = narrow(fmt), torch.randn(1, 70_000, 32).bfloat16()
    assert weight.indices_Rd.dtype == torch.int32 and within(spmm_panels(weight, x), fmt, x, None, "none")


@pytest.mark.parametrize("keep", [1, 2])
def test_infinity_and_nan_stay_in_their_lanes_and_keep_their_sign(keep):
    w = torch.zeros(4, 6).bfloat16()
    w[:, :keep] = torch.tensor([1.0, -2.0, 0.5, 3.0]).bfloat16()[:, None]
    x = torch.ones(1, 6, 32).bfloat16()
    x[0, 0, 3], x[0, 0, 7], x[0, 5] = torch.inf, torch.nan, torch.nan
    y = spmm_panels(narrow(RowGrouped.from_dense(w, g=4)), x)[0]
    assert y[:, 3].tolist() == [torch.inf, -torch.inf, torch.inf, torch.inf] and bool(y[:, 7].isnan().all())
    rest = [t for t in range(32) if t not in (3, 7)]
    assert torch.equal(y[:, rest], (keep * w[:, :1]).expand(4, 30))


def test_bfloat16_results_are_rounded_to_nearest_even():
    x = torch.randn(1, 1, 64).bfloat16()
    weight = narrow(CSR.from_dense(torch.ones(1, 1).bfloat16()))
    bias = torch.tensor([2.0**-9])
    assert torch.equal(spmm_panels(weight, x, bias), (x.float() + bias).bfloat16())


def test_same_bits_on_every_run_and_thread_count():
    weight, x, results = narrow(stored(100, 200, 4, 0.2)), torch.randn(2, 200, 96).bfloat16(), []
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        results += [spmm_panels(weight, x, None, "gelu") for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)


def test_one_plan_on_four_python_threads():
    fmt = stored(60, 90, 4, 0.3)
    plan = plan_panels(narrow(fmt), panels=2, width=64, activation="relu", threads=2)

    def run(seed):
        x = torch.randn(2, 90, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        y = torch.empty(2, 60, 64, dtype=torch.bfloat16)
        for _ in range(50):
            plan.run(x.data_ptr(), y.data_ptr(), 0)
            if not within(y, fmt, x, None, "relu"):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_copies_lay_out_their_own_plans(dtype):
    weight, x = narrow(stored(20, 30, 4, 0.5), dtype), torch.randn(1, 30, 64)
    x = x if dtype == torch.int8 else x.bfloat16()
    y = spmm_panels(weight, x)
    other = deepcopy(weight)
    weight.values_Rgd.zero_()
    assert torch.equal(spmm_panels(other, x), y) and not spmm_panels(weight, x)[0, 0].equal(y[0, 0])


def test_last_panel_may_be_used_less_and_nothing_is_fine():
    fmt, x = stored(20, 30, 1, 0.5), torch.randn(3, 30, 64).bfloat16()
    y, _ = guarded(3, 20, 64)
    plan_panels(narrow(fmt), panels=3, width=64, used_last=16, threads=1).run(x.data_ptr(), y.data_ptr(), 0)
    assert within(y[:2], fmt, x[:2], None, "none") and within(y[2:, :, :16], fmt, x[2:, :, :16], None, "none")
    assert bool(y[2, :, 16:].isnan().all())
    assert spmm_panels(narrow(fmt), x[:0]).shape == (0, 20, 64)


def same(got, fmt, quantised, bias, activation):
    """Integer sums are exact, so only the steps after them may round otherwise."""
    codes, scales = quantised.codes_PKW, quantised.scales_PW
    want = quantised_reference(fmt.to_dense(), codes, scales, bias, activation)
    return got.shape == want.shape and bool(torch.isclose(got, want, rtol=2e-6, atol=2e-6).all())


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 120), st.integers(1, 3), st.integers(1, 150)),
    st.sampled_from((1, 4)),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.sampled_from(("relu", "gelu")),
    st.integers(1, 2),
)
def test_8_bits_match_their_twin_inside_poison(size, g, density, activation, workers):
    rows, cols, panels, used = size
    width = -(-used // 64) * 64
    fmt, bias = stored(rows, cols, g, density, dtype=torch.float32), torch.randn(rows)
    x = quantise_panels(torch.randn(panels, cols, width))
    x.scales_PW[:, used:] = torch.nan
    y, sides = guarded(panels, rows, width, dtype=torch.float32)
    plan = plan_panels(
        narrow(fmt, torch.int8), panels=panels, width=width, used=used, activation=activation, threads=workers
    )
    plan.run(x.codes_PKW.data_ptr(), y.data_ptr(), bias.data_ptr(), x.scales_PW.data_ptr())
    real = Quantised(x.codes_PKW[..., :used], x.scales_PW[:, :used])
    assert same(y[..., :used], fmt, real, bias, activation)
    assert all(bool(side.isnan().all()) for side in sides)
    assert bool(y[..., -(-used // 16) * 16 :].isnan().all())


@pytest.mark.parametrize("g", [1, 2, 4, 8])
@pytest.mark.parametrize("used", [16, 48, 64, 80, 96, 196])
def test_every_tile_width_in_8_bits(g, used, threads):  # noqa: F811
    fmt = stored(70, 90, g, 0.3, dtype=torch.float32)
    x = torch.randn(2, 90, -(-used // 64) * 64)
    y = spmm_panels(narrow(fmt, torch.int8), x, None, "relu", used=used)[..., :used]
    quantised = quantise_panels(x)
    real = Quantised(quantised.codes_PKW[..., :used], quantised.scales_PW[:, :used])
    assert same(y, fmt, real, None, "relu")


def test_largest_sums_of_8_bits_do_not_saturate():
    fmt = CSR.from_dense(torch.ones(1, 4000))
    x = torch.ones(1, 4000, 64)
    x[..., 1::2] = -1
    y = spmm_panels(narrow(fmt, torch.int8), x)
    assert torch.allclose(y[0, 0, 0::2], torch.tensor(4000.0)) and torch.allclose(y[0, 0, 1::2], torch.tensor(-4000.0))


@pytest.mark.parametrize("used", [64, 100, 128])
def test_quantised_panels_match_their_twin(used, threads, monkeypatch):  # noqa: F811
    from gossamer.kernels.cpu import quantise

    monkeypatch.setattr(quantise, "GRAIN", 1)
    x = torch.randn(3, 70, 128) * torch.logspace(-3, 3, 128)
    x[1, :, 5] = 0.0
    x[..., used:] = torch.nan
    got, want = quantise_panels(x, used), quantise_reference(x[..., :used])
    assert torch.equal(got.codes_PKW[..., :used], want[0]) and torch.equal(got.scales_PW[:, :used], want[1])
    back = got.scales_PW[:, None, :used] * (got.codes_PKW[..., :used].float() - 128)
    error = (back - x[..., :used]).abs() - 0.501 * got.scales_PW[:, None, :used]
    assert float(error.max()) <= 0


def test_a_position_that_is_not_finite_has_no_scale_and_gives_nan():
    fmt, x = stored(8, 10, 4, 0.5, dtype=torch.float32), torch.randn(1, 10, 64)
    x[0, 3, 7], x[0, 2, 9] = torch.inf, torch.nan
    codes, scales = torch.empty(1, 10, 64, dtype=torch.uint8), torch.empty(1, 64)
    plan_quantise(panels=1, features=10, width=64).run(x.data_ptr(), codes.data_ptr(), scales.data_ptr())
    assert scales.isnan().nonzero().tolist() == [[0, 7], [0, 9]]
    y = torch.empty(1, 8, 64)
    plan = plan_panels(narrow(fmt, torch.int8), panels=1, width=64, threads=1)
    plan.run(codes.data_ptr(), y.data_ptr(), 0, scales.data_ptr())
    assert torch.equal(y.isnan(), scales.isnan()[:, None].expand_as(y))
    for call in (
        lambda: quantise_panels(x),
        lambda: spmm_panels(narrow(fmt, torch.int8), x),
        lambda: spmm_panels(narrow(fmt, torch.int8), Quantised(codes, scales)),
    ):
        with pytest.raises(FormatError, match="no finite scale"):
            call()


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2)),
    st.sampled_from((1, 4)),
    st.sampled_from((0.0, 0.3, 1.0)),
    st.sampled_from(tuple(LIMITS)),
    st.integers(1, 2),
)
def test_convolutions_match_torch_inside_poison(size, g, density, dtype, workers):
    rows, channels, high, wide, border = size
    place, kernel = Bordered(high, wide, border), 2 * border + 1
    fmt, bias = stored(rows, channels * kernel**2, g, density), torch.randn(rows)
    x, y = (guarded(n, place.plane, dtype=d) for n, d in ((channels, torch.bfloat16), (rows, dtype)))
    x[0].zero_(), y[0].zero_()
    place.pixels(x[0]).copy_(torch.randn(channels, high, wide))
    weight = narrow_convolution(fmt, place)
    plan = plan_narrow_convolution(weight, place, activation="relu", out_dtype=dtype, threads=workers)
    plan.run(x[0].data_ptr(), y[0].data_ptr(), bias.data_ptr())
    w = fmt.to_dense().double().view(rows, channels, kernel, kernel)
    image = place.pixels(x[0]).double()
    want = conv2d(image[None], w, bias.double(), padding=border)[0].relu()
    total = conv2d(image[None].abs(), w.abs(), padding=border)[0] + 1
    error = (place.pixels(y[0]) - want).abs()
    assert bool((error <= LIMITS[dtype] * want + LIMITS[torch.float32] * total).all())
    assert all(bool(side.isnan().all()) for side in y[1])
    place.pixels(y[0]).zero_()
    assert not y[0].any()


def test_a_bordered_image_has_room_for_what_is_read_and_written():
    for high, wide, border in ((1, 1, 0), (1, 1, 3), (28, 28, 1), (5, 31, 2)):
        place = Bordered(high, wide, border)
        read = -(-place.span // 16) * 16 + 2 * border * (place.line + 1)
        assert read <= place.plane and place.mask().neg().sum() == high * wide
    with pytest.raises(FormatError, match="multiple of 9"):
        narrow_convolution(stored(4, 10, 1, 0.5), Bordered(4, 4, 1))


@pytest.mark.parametrize("tokens", [0, 1, 17, 64, 130])
@pytest.mark.parametrize("scattered", [False, True])
def test_packed_layers_run_it_and_follow_their_values(tokens, scattered, threads):  # noqa: F811
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(3)) if scattered else torch.arange(24)
    w = stored(24, 40, 4, 0.3).to_dense()[rows]
    layer = nn.Linear(40, 24).bfloat16()
    layer.weight.data.copy_(w)
    packed = PackedLinear.from_linear(layer, RowGrouped, backend="cpu", activation="relu").eval()
    assert packed.plan.kernel == "cpu/narrow" and bool(packed.fmt.order.numel()) == scattered
    x = torch.randn(2, tokens, 40).bfloat16()
    with torch.inference_mode():
        for factor in (1, 2):
            want = (x.float() @ (factor * w.float()).t() + layer.bias.float()).relu()
            torch.testing.assert_close(packed(x).float(), want, rtol=2.0**-8, atol=1e-5)
            packed.values.mul_(2)


RUN = """
import torch
from gossamer.formats import RowGrouped
from gossamer.kernels.cpu.narrow import narrow
from gossamer.kernels.cpu.spmm_panels import spmm_panels
from gossamer.kernels.reference import panels_reference
mask = (torch.rand(12, 70) < 0.3).repeat_interleave(4, 0)[:45]
fmt = RowGrouped.from_dense(torch.randn(45, 70).bfloat16(), mask, g=4)
x, bias = torch.randn(2, 70, 128).bfloat16(), torch.randn(45)
for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
    y = spmm_panels(narrow(fmt), x, bias, "relu", out=torch.empty(2, 45, 128, dtype=dtype), used=100)[..., :100]
    want = panels_reference(fmt, x, bias, "relu", torch.float32)[..., :100]
    assert (y.float() - want).abs().max() < limit, dtype
    assert dtype == torch.float32 or float((y - want.bfloat16()).abs().gt(0).float().mean()) < 0.02

from gossamer.kernels.cpu.quantise import quantise_panels
from gossamer.kernels.reference.quantised import quantised_reference
fmt, x = RowGrouped.from_dense(torch.randn(45, 70), mask, g=4), quantise_panels(torch.randn(2, 70, 128))
want = quantised_reference(fmt.to_dense(), x.codes_PKW, x.scales_PW, bias, "relu")
assert (spmm_panels(narrow(fmt, torch.int8), x, bias, "relu") - want).abs().max() < 1e-5
"""


@ON_X86
@pytest.mark.parametrize("processor", ["haswell", "nehalem"])
def test_processors_without_the_dot_product_give_the_same_answers(processor, tmp_path):
    child(processor, tmp_path, RUN)


def test_wrong_inputs_are_refused_by_name():
    fmt, x = stored(8, 8, 1, 0.5), torch.randn(2, 8, 32).bfloat16()
    weight = narrow(fmt)
    for call, words in [
        (lambda: narrow(RowGrouped.from_dense(torch.ones(4, 4))), "convert it with .bfloat16"),
        (lambda: narrow(RowGrouped.from_dense(torch.ones(4, 4)), torch.float16), "bfloat16 or int8"),
        (lambda: narrow(CSR.from_dense(torch.tensor([[1.0, torch.inf]])), torch.int8), "not finite"),
        (lambda: narrow(CSR.from_dense(torch.ones(1, 70_000)), torch.int8), "at most 65536"),
        (lambda: spmm_panels(narrow(fmt, torch.int8), torch.randn(2, 8, 32)), "multiple of 64"),
        (lambda: quantise_panels(torch.randn(2, 8, 64), used=0), "of which 1..W are used; got 64, 0"),
        (lambda: spmm_panels(narrow(fmt, torch.int8), x), "x must be"),
        (lambda: narrow(RowGrouped.from_dense(torch.ones(3, 4).bfloat16(), g=3)), "by 3"),
        (lambda: spmm_panels(weight, x[:, :7]), "x must be"),
        (lambda: spmm_panels(weight, x.float()), "x must be"),
        (lambda: spmm_panels(weight, x, torch.randn(8).bfloat16()), "bias"),
        (lambda: spmm_panels(weight, x, out=torch.empty(2, 8, 16)), "out must be"),
        (lambda: spmm_panels(weight, x, out=x), "overlaps an input"),
        (lambda: spmm_panels(weight, x, residual_PMW=x), "no residual"),
        (lambda: spmm_panels(weight, x, used=33), "used positions"),
        (lambda: spmm_panels(weight, x[..., :16].contiguous()), "multiple of 32"),
        (
            lambda: plan_panels(weight, panels=1, width=32, out_dtype=torch.float16, threads=1),
            "bfloat16 or torch.float32",
        ),
        (
            lambda: plan_panels(weights(4, 4, 1, 1.0)[0], panels=1, width=32, out_dtype=torch.bfloat16, threads=1),
            "float32 weights write",
        ),
    ]:
        with pytest.raises(FormatError, match=words):
            call()
    with pytest.raises(UnknownName, match="gelu"):
        spmm_panels(weight, x, activation="gulu")
