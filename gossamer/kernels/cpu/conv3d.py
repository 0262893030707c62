"""Convolutions of volumes by sparse weights: every output slice is an image, every depth tap of a channel a channel.

Shapes: N volumes, C input and M output channels, D, H and W depth, height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import need_bias, need_floats
from gossamer.kernels.cpu.conv import Spread, plan_conv, refuse_conv
from gossamer.kernels.cpu.conv_plan import run_on
from gossamer.kernels.cpu.launch import Launch
from gossamer.kernels.cpu.plan import remember
from gossamer.kernels.cpu.stream import Stream
from gossamer.kernels.cpu.window import Depth, Window


def sparse_conv3d(
    weights: Stream,
    x_NCDHW: Tensor,
    window: Window,
    depth: Depth,
    bias_M: Tensor | None = None,
    activation: str = "none",
    *,
    groups: int = 1,
) -> Tensor:
    """Convolve volumes by sparse weights: act(conv(x) + bias).

    Slices are read in place, several times; padding the depth copies x once.

    Args:
        weights: [M, C / groups * kernel depth * height * width], columns in the order of a flattened conv weight.
        x_NCDHW: float32 [C, D, H, W] or [N, C, D, H, W], contiguous.
        window: kernel, stride, padding and dilation over height and width.
        depth: the same over the depth.
        bias_M: float32 [M].
        activation: as in `plan_conv`.
        groups: as in `plan_conv`.

    Raises:
        FormatError: a shape, dtype or layout does not fit.
        UnknownName: no such activation.

    Example:
        >>> y = sparse_conv3d(weights, volume, Window((3, 3)), Depth(3, front=1, back=1), bias, "relu")
    """
    need_bias(weights.rows, bias_M)
    if (refused := refuse_conv(weights, window, groups)) is not None:
        raise FormatError(refused)
    channels, rest = divmod(weights.cols // window.taps * groups, depth.kernel)
    if rest:
        raise FormatError(f"{weights.cols} columns are no multiple of {depth.kernel} x {window.taps} taps")
    fits = x_NCDHW.dim() in (4, 5) and x_NCDHW.shape[-4] == channels
    need_floats("x", x_NCDHW, f"[..., {channels}, D, H, W]", fits)
    out_deep = depth.output(x_NCDHW.shape[-3])
    high, wide = window.output(*x_NCDHW.shape[-2:])
    x = pad(x_NCDHW, (0, 0, 0, 0, depth.front, depth.back)) if depth.front or depth.back else x_NCDHW
    y = x.new_empty(*x.shape[:-4], weights.rows, out_deep, high, wide)
    if y.numel():
        plan = _planned(weights, x.shape[-3:], window, depth, groups, activation)
        for x_CDHW, y_MDHW in [(x, y)] if x.dim() == 4 else zip(x, y):
            run_on(plan, x_CDHW, y_MDHW, bias_M, None)
    return y


def _planned(weights: Stream, size: torch.Size, window: Window, depth: Depth, groups: int, activation: str) -> Launch:
    """The plan for one padded volume of this size, remembered with the weights."""
    threads = torch.get_num_threads()
    key = ("conv3d", size, window, depth, groups, activation, threads, weights.addresses)
    if (found := weights.plans.get(key)) is None:
        deep, high, wide = size
        out_high, out_wide = window.output(high, wide)
        slices = (deep - (depth.kernel - 1) * depth.dilation - 1) // depth.stride + 1
        channels = weights.cols // window.taps * groups // depth.kernel
        taps = torch.arange(depth.kernel) * depth.dilation
        at = (torch.arange(channels)[:, None] * deep + taps).flatten() * (high * wide)
        found = plan_conv(
            weights, slices, high, wide, window, groups=groups, activation=activation, threads=threads,
            strides=(high * wide, slices * out_high * out_wide),
            spread=Spread(depth.stride * high * wide, at, out_high * out_wide),
        )  # fmt: skip
        remember(weights, key, found)
    return found
