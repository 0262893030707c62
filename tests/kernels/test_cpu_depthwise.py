"""Depthwise convolutions on the CPU against torch, on odd sizes, windows and paddings, with poison around."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from gossamer.core.errors import FormatError, UnknownName
from gossamer.kernels.cpu import conv_plan
from gossamer.kernels.cpu.depthwise import depthwise, plan_depthwise
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.window import Window, same_padding

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "hard_swish": functional.hardswish,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
}


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(conv_plan, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def poisoned(*shape):
    """A contiguous tensor inside a larger one of NaN, and the surroundings, to be checked afterwards."""
    count, margin = torch.Size(shape).numel(), 67
    whole = torch.full((count + 2 * margin,), torch.nan)
    return whole[margin : margin + count].view(shape), (whole[:margin], whole[margin + count :])


def exact(x, weight, window, bias=None):
    """The convolution in float64."""
    top, left, bottom, right = window.padding
    x = functional.pad(x.double(), (left, right, top, bottom))
    bias = None if bias is None else bias.double()
    channels = weight.shape[0]
    return functional.conv2d(x, weight.double()[:, None], bias, window.stride, 0, window.dilation, channels)


def close(got, want):
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


windows = st.builds(
    Window,
    st.sampled_from(((3, 3), (5, 5), (1, 1), (2, 2), (3, 5), (1, 7), (4, 3))),
    st.sampled_from(((1, 1), (2, 2), (3, 3), (1, 2), (2, 1))),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.sampled_from(((1, 1), (1, 1), (2, 2), (1, 3))),
)


@settings(max_examples=120, deadline=None)
@given(windows, st.integers(1, 20), st.integers(1, 70), st.booleans(), st.booleans())
def test_any_window_matches_float64_inside_poison(window, high, wide, with_bias, with_residual):
    try:
        out_size = window.output(high, wide)
    except FormatError:
        return
    weight, x = torch.randn(3, *window.kernel), poisoned(2, 3, high, wide)
    y, bias = poisoned(2, 3, *out_size), torch.randn(3) if with_bias else None
    x[0].copy_(torch.randn(2, 3, high, wide))
    residual = torch.randn(2, 3, *out_size) if with_residual else None
    assert depthwise(weight, x[0], window, bias, "relu6", residual, y[0]) is y[0]
    want = exact(x[0], weight, window, bias) + (0 if residual is None else residual.double())
    close(y[0], want.clamp(0, 6))
    assert all(bool(side.isnan().all()) for side in (*x[1], *y[1]))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 8, 14, 15, 16, 17, 28, 33, 56, 65, 112])
def test_sizes_of_networks(kernel, stride, size, threads):
    padding = same_padding((kernel, kernel), (stride, stride), (1, 1), size, size)
    for pad in (padding, (kernel // 2,) * 4):
        window = Window((kernel, kernel), (stride, stride), pad)
        weight, x, bias = torch.randn(9, kernel, kernel), torch.randn(1, 9, size, size), torch.randn(9)
        close(depthwise(weight, x, window, bias, "relu"), exact(x, weight, window, bias).relu())


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("window", [Window((3, 3), padding=(1, 1, 1, 1)), Window((2, 4), (3, 3))])
def test_activations(activation, window):
    weight, x = torch.randn(4, *window.kernel), torch.randn(4, 11, 21)
    want = ACTIVATIONS[activation](exact(x[None], weight, window)[0])
    close(depthwise(weight, x, window, None, activation), want)


def test_planes_keep_their_padding_and_lines_do_not_see_it(threads):
    window, weight = Window((3, 3), padding=(1, 1, 1, 1)), torch.randn(6, 3, 3)
    x, y = torch.full((2, 6, plane_stride(63)), torch.nan), torch.full((2, 6, plane_stride(63)), torch.nan)
    x[..., :63] = torch.randn(2, 6, 63)
    launch = plan_depthwise(weight, 2, 7, 9, window, threads=threads)
    launch.run(x.data_ptr(), y.data_ptr(), 0)
    close(y[..., :63].view(2, 6, 7, 9), exact(x[..., :63].view(2, 6, 7, 9), weight, window))
    assert bool(y[..., 63:].isnan().all())


def test_no_images_are_no_work():
    plan = plan_depthwise(torch.ones(4, 3, 3), 0, 20, 20, Window((3, 3), padding=(1, 1, 1, 1)), threads=2)
    plan.run(0, 0, 0)
    assert plan.threads == 1


def test_results_do_not_depend_on_threads():
    window, weight, x = Window((5, 5), padding=(2, 2, 2, 2)), torch.randn(40, 5, 5), torch.randn(3, 40, 30, 30)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(depthwise(weight, x, window))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_nan_reaches_its_own_window_only():
    x = torch.randn(2, 20, 20)
    x[0, 10, 10] = torch.nan
    y = depthwise(torch.ones(2, 3, 3), x, Window((3, 3), padding=(1, 1, 1, 1)), None, "relu6")
    assert bool(y[0, 9:12, 9:12].isnan().all()) and int(y.isnan().sum()) == 9


def test_what_does_not_fit_is_refused():
    window = Window((3, 3))
    with pytest.raises(FormatError, match="does not fit into an image"):
        depthwise(torch.zeros(2, 3, 3), torch.zeros(2, 2, 9), window)
    with pytest.raises(FormatError, match="weight must be"):
        depthwise(torch.zeros(2, 3, 5), torch.zeros(2, 9, 9), window)
    with pytest.raises(FormatError, match="x must be"):
        depthwise(torch.zeros(2, 3, 3), torch.zeros(3, 9, 9), window)
    with pytest.raises(FormatError, match="residual must be"):
        depthwise(torch.zeros(2, 3, 3), torch.zeros(2, 9, 9), window, residual=torch.zeros(2, 9, 9))
    with pytest.raises(FormatError, match="at least 1"):
        Window((3, 0))
    with pytest.raises(UnknownName):
        depthwise(torch.zeros(2, 3, 3), torch.zeros(2, 9, 9), window, None, "relu7")
