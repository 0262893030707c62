"""Pooling, sums, scales and layouts of image planes on the CPU against torch."""

import pytest
import torch
from torch.nn import functional

from gossamer.core.errors import FormatError, UnknownName
from gossamer.kernels.cpu import conv_plan
from gossamer.kernels.cpu.plane_ops import from_planes, plan_add, plan_mean, plan_pool, plan_scale, pool, to_planes
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.window import Window

SIZES = [(1, 1), (7, 7), (5, 17), (14, 14), (16, 16), (9, 40)]


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(conv_plan, "GRAIN", 1)


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def planes_of(x):
    """Planes whose padding is NaN, so that nothing may read it."""
    planes = torch.full((*x.shape[:2], plane_stride(x[0, 0].numel())), torch.nan)
    planes[..., : x[0, 0].numel()] = x.flatten(2)
    return planes


@pytest.mark.parametrize("size", SIZES)
def test_planes_and_back(size):
    x = torch.randn(2, 37, *size)
    for given in (x, x.to(memory_format=torch.channels_last)):
        planes = to_planes(given)
        assert torch.equal(planes[..., : x[0, 0].numel()].reshape(x.shape), x)
        assert not planes[..., x[0, 0].numel() :].any()
        assert torch.equal(from_planes(planes, *size), x)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("kernel, stride, padding, dilation", [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 1), (2, 3, 1, 2)])
def test_pooling(size, kernel, stride, padding, dilation):
    x = torch.randn(2, 5, *size)
    window = Window((kernel, kernel), (stride, stride), (padding,) * 4, (dilation, dilation))
    want = functional.max_pool2d(x, kernel, stride, padding, dilation)
    assert torch.equal(pool("max", x, window), want)
    if dilation == 1:
        for kind, count in (("mean", True), ("mean_inside", False)):
            want = functional.avg_pool2d(x, kernel, stride, padding, count_include_pad=count)
            torch.testing.assert_close(pool(kind, x, window), want)


def test_pooling_of_planes_with_uneven_padding(threads):
    x = torch.randn(2, 3, 9, 13)
    window = Window((3, 3), (2, 2), (0, 0, 1, 1))
    want = functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)
    planes, y = planes_of(x), torch.full((2, 3, plane_stride(want[0, 0].numel())), torch.nan)
    plan_pool("max", 2, 3, 9, 13, window, threads=threads).run(planes.data_ptr(), y.data_ptr())
    assert torch.equal(y[..., : want[0, 0].numel()].reshape(want.shape), want)
    assert bool(y[..., want[0, 0].numel() :].isnan().all())


def test_the_largest_of_a_window_with_nan_is_nan():
    x = torch.zeros(1, 1, 6, 6)
    x[0, 0, 2, 2], x[0, 0, 5, 5] = torch.nan, -torch.inf
    want = functional.max_pool2d(x, 3, 1, 1)
    assert torch.equal(pool("max", x, Window((3, 3), padding=(1, 1, 1, 1))).isnan(), want.isnan())


@pytest.mark.parametrize("size", SIZES)
def test_mean_sum_and_scale_of_planes(size, threads):
    images, channels, pixels = 2, 11, size[0] * size[1]
    a, b, s = torch.randn(2, 11, *size), torch.randn(2, 11, *size), torch.randn(2, 11)
    at, bt = planes_of(a), planes_of(b)
    mean = torch.empty(2, 11)
    plan_mean(images, channels, pixels, threads=threads).run(at.data_ptr(), mean.data_ptr())
    torch.testing.assert_close(mean, a.mean((2, 3)), atol=1e-6, rtol=1e-5)
    for name, act in (("none", lambda z: z), ("relu6", functional.relu6), ("silu", functional.silu)):
        y = torch.full_like(at, torch.nan)
        launch = plan_add(images, channels, pixels, activation=name, threads=threads)
        launch.run(at.data_ptr(), bt.data_ptr(), y.data_ptr())
        torch.testing.assert_close(y[..., :pixels].reshape(a.shape), act(a + b), atol=2e-6, rtol=1e-5)
        assert bool(y[..., pixels:].isnan().all())
    for name, gate in (("none", lambda z: z), ("sigmoid", torch.sigmoid), ("hard_sigmoid", functional.hardsigmoid)):
        y = at.clone()
        launch = plan_scale(images, channels, pixels, gate=name, threads=threads)
        launch.run(y.data_ptr(), s.data_ptr(), y.data_ptr())
        torch.testing.assert_close(y[..., :pixels].reshape(a.shape), a * gate(s)[..., None, None], atol=2e-6, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnknownName):
        pool("median", torch.zeros(1, 4, 4), Window((2, 2)))
    with pytest.raises(UnknownName):
        plan_scale(1, 1, 1, gate="tanh")
    with pytest.raises(FormatError, match="padding must be less"):
        pool("max", torch.zeros(1, 4, 4), Window((2, 2), padding=(2, 0, 0, 0)))
    with pytest.raises(FormatError, match="x must be"):
        to_planes(torch.zeros(1, 4, 4, dtype=torch.float64))
    with pytest.raises(FormatError, match="planes must be"):
        from_planes(torch.zeros(1, 4, 16), 5, 5)
