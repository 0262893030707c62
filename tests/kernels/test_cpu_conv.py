"""Convolutions by sparse weights on the CPU against float64 torch, on odd sizes and windows, with poison around."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from gossamer.core.errors import FormatError, UnknownName
from gossamer.kernels.cpu import conv_plan
from gossamer.kernels.cpu.conv import dense_stream, plan_conv, sparse_conv, spmm_conv
from gossamer.kernels.cpu.conv_choice import Tuning
from gossamer.kernels.cpu.conv_layout import ALIGNED, FLAT, HALO
from gossamer.kernels.cpu.conv_plan import run_on
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.stream import stream
from gossamer.kernels.cpu.window import Window, same_padding

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "hard_swish": functional.hardswish,
    "gelu": functional.gelu,
}
SAME = Window((3, 3), padding=(1, 1, 1, 1))


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(conv_plan, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weights(rows, cols, g, density, seed=0):
    """A random grouped stream and the dense [rows, cols] matrix that it stores."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-rows // g)
    mask = torch.rand(groups, cols, generator=draw) < density
    group_E, column_E = mask.nonzero(as_tuple=True)
    w = torch.zeros(groups, g, cols)
    w[group_E, :, column_E] = torch.randn(len(group_E), g, generator=draw)
    w = w.reshape(groups * g, cols)
    w[rows:] = 0
    values = w.reshape(groups, g, cols)[group_E, :, column_E].contiguous()
    indptr = torch.zeros(groups + 1, dtype=torch.int32)
    indptr[1:] = mask.sum(1).cumsum(0)
    return stream(g, rows, cols, indptr, column_E.to(torch.uint16), values), w[:rows].contiguous()


def poisoned(*shape):
    """A contiguous tensor inside a larger one of NaN, and the surroundings, to be checked afterwards."""
    count, margin = torch.Size(shape).numel(), 67
    whole = torch.full((count + 2 * margin,), torch.nan)
    return whole[margin : margin + count].view(shape), (whole[:margin], whole[margin + count :])


def exact(x, w, window, bias=None, groups=1):
    """The convolution in float64."""
    top, left, bottom, right = window.padding
    x = functional.pad(x.double(), (left, right, top, bottom))
    w = w.double().view(w.shape[0], -1, *window.kernel)
    bias = None if bias is None else bias.double()
    return functional.conv2d(x, w, bias, window.stride, 0, window.dilation, groups)


def close(got, want):
    torch.testing.assert_close(got.double(), want, atol=3e-5, rtol=3e-5)


windows = st.builds(
    Window,
    st.sampled_from(((1, 1), (3, 3), (5, 5), (1, 3), (2, 4), (7, 1))),
    st.sampled_from(((1, 1), (1, 1), (2, 2), (3, 3), (1, 2), (2, 1))),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.sampled_from(((1, 1), (1, 1), (2, 2), (1, 3))),
)
tunings = st.builds(
    Tuning, st.sampled_from((None, FLAT, ALIGNED, HALO)), st.sampled_from((None, 1, 2)), st.sampled_from((None, 1, 3))
)


@settings(max_examples=150, deadline=None)
@given(
    windows,
    tunings,
    st.tuples(st.integers(1, 18), st.integers(1, 50)),
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.sampled_from((1, 1, 2, 3)),
    st.booleans(),
)
def test_any_convolution_matches_float64_inside_poison(window, tuning, size, g, density, groups, with_residual):
    try:
        out_size = window.output(*size)
    except FormatError:
        return
    rows, channels = (8 * groups if groups > 1 else 13), 3 * groups
    weight, w = weights(rows, 3 * window.taps, g, density)
    (x, around_x), (y, around_y) = poisoned(2, channels, *size), poisoned(2, rows, *out_size)
    x.copy_(torch.randn(x.shape))
    bias, residual = torch.randn(rows), torch.randn(y.shape) if with_residual else None
    strides = size[0] * size[1], out_size[0] * out_size[1]
    plan = plan_conv(
        weight, 2, *size, window, groups=groups, activation="relu6", residual=with_residual, threads=2,
        strides=strides, tuning=tuning,
    )  # fmt: skip
    run_on(plan, x, y, bias, residual)
    want = exact(x, w, window, bias, groups) + (residual.double() if with_residual else 0)
    close(y, want.clamp(0, 6))
    assert all(bool(side.isnan().all()) for side in (*around_x, *around_y))


@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("size", [7, 14, 28, 33, 56])
@pytest.mark.parametrize("stride", [1, 2])
def test_sizes_of_networks(g, size, stride, threads):
    window = Window((3, 3), (stride, stride), same_padding((3, 3), (stride, stride), (1, 1), size, size))
    weight, w = weights(40, 9 * 30, g, 0.2)
    x, bias = torch.randn(1, 30, size, size), torch.randn(40)
    close(sparse_conv(weight, x, window, bias, "relu"), exact(x, w, window, bias).relu())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_and_missing_bias(activation, threads):
    weight, w = weights(21, 9 * 6, 4, 0.5)
    x = torch.randn(6, 20, 24)
    close(sparse_conv(weight, x, SAME, None, activation), ACTIVATIONS[activation](exact(x[None], w, SAME)[0]))


def test_planes_with_poisoned_padding(threads):
    weight, w = weights(16, 9 * 5, 2, 0.5)
    x, y = torch.full((2, 5, plane_stride(81)), torch.nan), torch.full((2, 16, plane_stride(81)), torch.nan)
    x[..., :81] = torch.randn(2, 5, 81)
    plan_conv(weight, 2, 9, 9, SAME, threads=threads).run(x.data_ptr(), y.data_ptr(), 0)
    close(y[..., :81].view(2, 16, 9, 9), exact(x[..., :81].view(2, 5, 9, 9), w, SAME))
    assert bool(y[..., 81:].isnan().all())


def test_no_images_are_no_work():
    weight, _ = weights(8, 36, 4, 0.5)
    plan = plan_conv(weight, 0, 9, 9, SAME, threads=2)
    plan.run(0, 0, 0)
    assert plan.threads == 1


def test_lines_in_one_dimension():
    weight, w = weights(12, 5 * 7, 4, 0.4)
    window = Window((1, 7), (1, 2), (0, 3, 0, 2), (1, 2))
    x = torch.randn(3, 5, 1, 100)
    want = functional.conv1d(functional.pad(x[:, :, 0], (3, 2)), w.view(12, 5, 7), None, 2, 0, 2)
    torch.testing.assert_close(sparse_conv(weight, x, window)[:, :, 0], want, atol=3e-5, rtol=3e-5)


def test_a_dense_first_convolution(threads):
    w, bias = torch.randn(30, 3, 3, 3), torch.randn(30)
    window, x = Window((3, 3), (2, 2), (0, 0, 1, 1)), torch.randn(2, 3, 50, 66)
    close(sparse_conv(dense_stream(w.flatten(1)), x, window, bias, "relu6"), exact(x, w, window, bias).clamp(0, 6))


@pytest.mark.parametrize("g", [1, 2, 4, 8])
def test_a_residual_may_be_the_result(g, threads):
    weight, w = weights(19, 9 * 5, g, 0.5)
    x, y = torch.randn(5, 21, 33), torch.randn(19, 21, 33)
    want = exact(x[None], w, SAME)[0] + y
    close(sparse_conv(weight, x, SAME, residual=y, out=y), want)


def test_results_do_not_depend_on_threads_or_callers():
    weight, _ = weights(64, 9 * 20, 4, 0.3)
    x, before = torch.randn(2, 20, 30, 30), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(sparse_conv(weight, x, SAME))
        with ThreadPoolExecutor(3) as pool:
            results += list(pool.map(lambda _: sparse_conv(weight, x, SAME), range(6)))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_weights_that_moved_are_read_where_they_are():
    weight, w = weights(8, 9 * 4, 1, 0.5)
    x = torch.randn(4, 12, 12)
    first = sparse_conv(weight, x, SAME)
    weight.values_EG.share_memory_()
    weight.values_EG.mul_(2)
    torch.testing.assert_close(sparse_conv(weight, x, SAME), 2 * first)
    close(first, exact(x[None], w, SAME)[0])


def test_stride_one_by_kernel_and_padding():
    weight, w = weights(10, 6 * 3, 2, 0.6)
    x = torch.randn(2, 3, 9, 11)
    close(spmm_conv(weight, x, (2, 3), (1, 0)), exact(x, w, Window((2, 3), padding=(1, 0, 1, 0))))


def test_what_does_not_fit_is_refused():
    weight, _ = weights(8, 9 * 4, 4, 0.5)
    with pytest.raises(FormatError, match="x must be"):
        sparse_conv(weight, torch.zeros(5, 9, 9), SAME)
    with pytest.raises(FormatError, match="multiple of 4 columns"):
        sparse_conv(weights(8, 9, 4, 0.5)[0], torch.zeros(5, 9, 9), Window((2, 2)))
    with pytest.raises(FormatError, match="cut through"):
        sparse_conv(weight, torch.zeros(16, 9, 9), SAME, groups=4)
    with pytest.raises(FormatError, match="do not fall into"):
        sparse_conv(weight, torch.zeros(12, 9, 9), SAME, groups=3)
    with pytest.raises(FormatError, match="does not fit into an image"):
        sparse_conv(weight, torch.zeros(4, 2, 2), Window((3, 3)))
    with pytest.raises(UnknownName):
        sparse_conv(weight, torch.zeros(4, 9, 9), SAME, None, "swish")
