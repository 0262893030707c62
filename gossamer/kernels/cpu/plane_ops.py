"""What networks do with image planes between products: pooling, sums, channel scales, changes of layout.

Planes are [images, channels, stride] float32 (see `planes`). Plans run on addresses; padding behind the pixels is
neither read nor, except by `plan_to_planes`, written.

Shapes: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, unknown
from gossamer.kernels.cpu.checks import need_floats, output
from gossamer.kernels.cpu.conv_plan import bounds_of, laid_out, shares
from gossamer.kernels.cpu.launch import Launch
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.window import Window

POOLS = ("max", "mean", "mean_inside")
GATES = ("none", "sigmoid", "hard_sigmoid")


def _launch(
    entry, addresses: int, planes: int, pixels: int, strides: tuple[int, int], threads: int, *more: int
) -> Launch:
    """A launch of which every task is a run of planes. Moving a float costs about as much as four multiply-adds."""
    threads, tasks = shares(planes, 4 * pixels, threads)
    fixed = (tasks, planes, pixels, 4 * strides[0], 4 * strides[1], *more)
    return laid_out(entry, addresses=addresses, absent=3 - addresses, fixed=fixed, threads=threads)


def plan_pool(
    kind: str,
    images: int,
    channels: int,
    high: int,
    wide: int,
    window: Window,
    *,
    threads: int = 1,
    strides: tuple[int, int] | None = None,
) -> Launch:
    """Lay out pooling of windows; run it with addresses x, y.

    Args:
        kind: "max", "mean" (padding counts as zeros) or "mean_inside" (padding does not count).
        images: N.
        channels: C.
        high, wide: H and W of x.
        window: kernel, stride, padding, dilation.
        threads: how many may work.
        strides: floats from plane to plane of x and of y; `plane_stride` of their pixels if None.

    Raises:
        UnknownName: no such kind.
        FormatError: the window does not fit the image, or its padding reaches as far as the kernel.

    Example:
        >>> launch = plan_pool("max", 1, 64, 112, 112, Window((3, 3), (2, 2), (1, 1, 1, 1)))
        >>> launch.run(x.data_ptr(), y.data_ptr())
    """
    from gossamer.kernels.cpu.plane_kernel import pool_kernel

    if kind not in POOLS:
        raise unknown("kind of pooling", kind, POOLS)
    top, left, bottom, right = window.padding
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilation)]
    if max(top, bottom) >= spans[0] or max(left, right) >= spans[1]:
        raise FormatError(f"padding must be less than the kernel, or windows see no pixel at all; got {window}")
    out_high, out_wide = window.output(high, wide)
    strides = strides or (plane_stride(high * wide), plane_stride(out_high * out_wide))
    entry, work = pool_kernel(POOLS.index(kind), int(window.stride[1] == 1)), window.taps * out_high * out_wide
    return _launch(
        entry, 2, images * channels, work, strides, threads,
        high, wide, out_high, out_wide, *window.kernel, *window.stride, *window.dilation, top, left,
    )  # fmt: skip


def plan_mean(images: int, channels: int, pixels: int, *, threads: int = 1, stride: int | None = None) -> Launch:
    """Lay out the mean of every plane, [images, channels] packed; run it with addresses x, y.

    Args:
        images: N.
        channels: C.
        pixels: H * W, at least 1.
        threads: how many may work.
        stride: floats from plane to plane of x; `plane_stride` of the pixels if None.

    Example:
        >>> plan_mean(1, 1280, 49).run(x.data_ptr(), y.data_ptr())
    """
    from gossamer.kernels.cpu.plane_kernel import mean_kernel

    strides = (stride or plane_stride(pixels), 1)
    return _launch(mean_kernel(), 2, images * channels, pixels, strides, threads)


def plan_to_planes(images: int, channels: int, pixels: int, *, channels_last: bool = False, threads: int = 1) -> Launch:
    """Lay out copying ordinary images to planes, zeros behind the pixels; run it with addresses x, y.

    Args:
        images: N.
        channels: C.
        pixels: H * W.
        channels_last: x is [N, H, W, C] in memory instead of [N, C, H, W].
        threads: how many may work.

    Example:
        >>> plan_to_planes(1, 3, 224 * 224).run(image.data_ptr(), planes.data_ptr())
    """
    from gossamer.kernels.cpu.plane_kernel import copy_kernel, gather_kernel

    stride = plane_stride(pixels)
    if not channels_last:
        return _launch(copy_kernel(), 2, images * channels, pixels, (pixels, stride), threads)
    from gossamer.kernels.cpu.target import lanes

    threads, _ = shares(images * channels, 4 * pixels, threads)
    parts = 1 if threads == 1 else min(4 * threads, -(-channels // lanes()))
    fixed = (images * parts, images * channels, pixels, 4, 4 * stride, channels)
    return laid_out(gather_kernel(), addresses=2, absent=1, fixed=fixed, threads=threads)


def plan_from_planes(images: int, channels: int, pixels: int, *, threads: int = 1) -> Launch:
    """Lay out copying planes to images [N, C, H, W]; run it with addresses x, y.

    Example:
        >>> plan_from_planes(1, 32, 112 * 112).run(planes.data_ptr(), image.data_ptr())
    """
    from gossamer.kernels.cpu.plane_kernel import copy_kernel

    return _launch(copy_kernel(), 2, images * channels, pixels, (plane_stride(pixels), pixels), threads)


def plan_add(
    images: int, channels: int, pixels: int, *, activation: str = "none", threads: int = 1, stride: int | None = None
) -> Launch:
    """Lay out y = act(a + b) on planes; run it with addresses a, b, y, of which y may be a or b.

    Args:
        images: N.
        channels: C.
        pixels: H * W.
        activation: "none", "relu", "relu6", "silu", "hard_swish", "gelu" or "gelu_tanh".
        threads: how many may work.
        stride: floats from plane to plane; `plane_stride` of the pixels if None.

    Raises:
        UnknownName: no such activation.

    Example:
        >>> plan_add(1, 24, 56 * 56).run(a.data_ptr(), b.data_ptr(), a.data_ptr())
    """
    from gossamer.kernels.cpu.plane_kernel import add_kernel

    stride, bounds = stride or plane_stride(pixels), bounds_of(activation)
    return _launch(add_kernel(), 3, images * channels, pixels, (stride, stride), threads, *bounds)


def plan_scale(
    images: int, channels: int, pixels: int, *, gate: str = "none", threads: int = 1, stride: int | None = None
) -> Launch:
    """Lay out y = x * gate(s) with one s per image and channel; run it with addresses x, s, y, of which y may be x.

    Args:
        images: N.
        channels: C.
        pixels: H * W.
        gate: "none", "sigmoid" or "hard_sigmoid", applied to s: what squeeze-and-excite ends in.
        threads: how many may work.
        stride: floats from plane to plane; `plane_stride` of the pixels if None.

    Raises:
        UnknownName: no such gate.

    Example:
        >>> plan_scale(1, 96, 14 * 14, gate="sigmoid").run(x.data_ptr(), s.data_ptr(), x.data_ptr())
    """
    from gossamer.kernels.cpu.plane_kernel import scale_kernel

    if gate not in GATES:
        raise unknown("gate", gate, GATES)
    stride = stride or plane_stride(pixels)
    return _launch(scale_kernel(GATES.index(gate)), 3, images * channels, pixels, (stride, stride), threads)


def pool(kind: str, x_NCHW: Tensor, window: Window, out: Tensor | None = None) -> Tensor:
    """Pool ordinary images [C, H, W] or [N, C, H, W]; kinds and errors as in `plan_pool`.

    Example:
        >>> pool("max", torch.zeros(2, 3, 8, 8), Window((2, 2), (2, 2))).shape
        torch.Size([2, 3, 4, 4])
    """
    need_floats("x", x_NCHW, "[..., C, H, W]", x_NCHW.dim() in (3, 4))
    high, wide = x_NCHW.shape[-2:]
    out_high, out_wide = window.output(high, wide)
    out = output(out, (*x_NCHW.shape[:-2], out_high, out_wide), (x_NCHW,))
    if out.numel():
        planes, strides = out.numel() // (out_high * out_wide), (high * wide, out_high * out_wide)
        plan = plan_pool(kind, 1, planes, high, wide, window, threads=torch.get_num_threads(), strides=strides)
        plan.run(x_NCHW.data_ptr(), out.data_ptr())
    return out


def to_planes(x_NCHW: Tensor) -> Tensor:
    """Images as planes [N, C, stride]: contiguous or channels_last float32 [N, C, H, W] in.

    Raises:
        FormatError: another dtype, device or layout.

    Example:
        >>> to_planes(torch.zeros(1, 3, 14, 14)).shape
        torch.Size([1, 3, 208])
    """
    last = not x_NCHW.is_contiguous()
    seen = x_NCHW.permute(0, 2, 3, 1) if last and x_NCHW.dim() == 4 else x_NCHW
    need_floats("x", seen, "[N, C, H, W]", x_NCHW.dim() == 4)
    images, channels, high, wide = x_NCHW.shape
    y = torch.empty(images, channels, plane_stride(high * wide), dtype=torch.float32, device="cpu")
    if x_NCHW.numel():
        threads = torch.get_num_threads()
        plan = plan_to_planes(images, channels, high * wide, channels_last=last, threads=threads)
        plan.run(x_NCHW.data_ptr(), y.data_ptr())
    return y


def from_planes(planes: Tensor, high: int, wide: int) -> Tensor:
    """Planes [N, C, stride] as ordinary images [N, C, H, W].

    Raises:
        FormatError: the planes are not those of such images.

    Example:
        >>> from_planes(to_planes(image), 14, 14)
    """
    stride = plane_stride(high * wide)
    need_floats("planes", planes, f"[N, C, {stride}]", planes.dim() == 3 and planes.shape[-1] == stride)
    images, channels = planes.shape[:2]
    y = torch.empty(images, channels, high, wide, dtype=torch.float32, device="cpu")
    if y.numel():
        plan = plan_from_planes(images, channels, high * wide, threads=torch.get_num_threads())
        plan.run(planes.data_ptr(), y.data_ptr())
    return y
