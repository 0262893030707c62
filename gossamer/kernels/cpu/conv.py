"""Convolutions by sparse weights on the CPU, without im2col.

Shapes: N images, M output channels, C input channels, H and W height and width, E stored entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu import conv_plan
from gossamer.kernels.cpu.bands import Bands, Part
from gossamer.kernels.cpu.checks import need_bias, need_counts, need_floats, output
from gossamer.kernels.cpu.conv_choice import Tuning, block_of, lines_of, wasted
from gossamer.kernels.cpu.conv_columns import Columns
from gossamer.kernels.cpu.conv_entries import entries, run_entries
from gossamer.kernels.cpu.conv_layout import Lines
from gossamer.kernels.cpu.conv_plan import bounds_of, laid_out, run_on, zeros_at
from gossamer.kernels.cpu.launch import Launch
from gossamer.kernels.cpu.plan import remember
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.stream import Stream, stream
from gossamer.kernels.cpu.window import Window


@dataclass(frozen=True)
class Spread:
    """Where images lie that do not follow each other, in floats.

    Args:
        x_image: from image to image of x; they may overlap.
        x_channels_C: int64 [C]; of each channel, from the beginning of its image.
        y_image: from image to image of y.
    """

    x_image: int
    x_channels_C: Tensor
    y_image: int


def dense_stream(weight_MK: Tensor) -> Stream:
    """A dense weight as a stream that keeps everything, in groups of eight rows: for first convolutions.

    Example:
        >>> first = dense_stream(conv.weight.detach().flatten(1))
    """
    rows, cols = weight_MK.shape
    groups = -(-rows // 8)
    values = torch.zeros(groups * 8, cols, dtype=torch.float32)
    values[:rows] = weight_MK.detach()
    values = values.view(groups, 8, cols).transpose(1, 2).reshape(-1, 8).contiguous()
    indptr = torch.arange(groups + 1, dtype=torch.int32) * cols
    return stream(8, rows, cols, indptr, torch.arange(cols, dtype=torch.int32).repeat(groups), values)


def plan_conv(
    weights: Stream,
    images: int,
    high: int,
    wide: int,
    window: Window,
    *,
    groups: int = 1,
    activation: str = "none",
    residual: bool = False,
    threads: int = 1,
    strides: tuple[int, int] | None = None,
    spread: Spread | None = None,
    tuning: Tuning | None = None,
) -> Launch:
    """Lay out act(conv(x) + bias + residual) on image planes; run it with addresses x, y, bias[, residual].

    Args:
        weights: [M, C / groups * kernel height * kernel width], columns in the order of a flattened conv weight.
        images: N.
        high, wide: H and W of x.
        window: kernel, stride, padding, dilation.
        groups: as in `torch.nn.Conv2d`; rows that share their columns must lie in one group.
        activation: "none", "relu", "relu6", "silu", "hard_swish", "gelu" or "gelu_tanh".
        residual: whether a fourth address brings planes to add, of the size of y, which may be y itself; bias may be 0.
        threads: how many may work.
        strides: floats from plane to plane of x and of y (and the residual); `plane_stride` of their pixels if None.
        spread: where images and channels lie, if not one behind the other.
        tuning: how to lay it out, for measuring.

    Raises:
        FormatError: weights, window and groups do not fit each other or the image.
        UnknownName: no such activation.

    Example:
        >>> launch = plan_conv(weights, 1, 28, 28, Window((3, 3), padding=(1, 1, 1, 1)), activation="relu")
        >>> launch.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    """
    from gossamer.kernels.cpu import conv_kernel, runs_kernel
    from gossamer.kernels.cpu.target import lanes

    need_counts(images=images)
    if (refused := refuse_conv(weights, window, groups)) is not None:
        raise FormatError(refused)
    out_high, out_wide = window.output(high, wide)
    pixels, out_pixels = high * wide, out_high * out_wide
    x_plane, y_plane = strides or (plane_stride(pixels), plane_stride(out_pixels))
    channels, runs = weights.cols // window.taps * groups, weights.runs and wasted(out_wide, lanes()) < 2
    spread = spread or Spread(x_plane * channels, torch.arange(channels) * x_plane, y_plane * weights.rows)
    channels_at = 4 * spread.x_channels_C
    most = runs_kernel.HEIGHTS[-1] if runs else conv_kernel.widths(weights.g)[-1]
    work = weights.values_EG.numel() * out_pixels * images
    threads = max(1, min(threads, work // conv_plan.GRAIN))
    lines = lines_of(
        weights, window, out_high, out_wide, channels, threads if images < threads else 1, tuning or Tuning(), runs
    )
    block = block_of(weights, window, lines, most, tuning, runs)
    offsets, starts = (run_entries if runs else entries)(weights, window, groups, lines, block)
    blocks = len(starts) if runs else len(starts) - 1
    chunks = max(1, min(weights.groups, -(-threads // max(1, lines.panels * images))))
    sums_at = 4 * channels * lines.channel + 4 * lanes() * (most + 1)
    hold = 4 * lanes() * most * weights.g * -(-weights.groups // chunks) if blocks > 1 else 0
    scratch = -(-(sums_at + hold) // 64) * 64
    code, low_at, high_at = bounds_of(activation)
    ordered, order = weights.order_M is not None, weights.places()

    more = (lines.across, 4 * lines.strip, lines.depth, window.stride[0]) if isinstance(lines, Columns) else ()

    def numbers(lines: Lines, chunks: int, below: int) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        # Of the output lines from `below` on.
        table, places = torch.from_numpy(lines.table()), torch.from_numpy(lines.places())
        table[:, 0] += below * window.stride[0]
        fixed = (
            images * lines.panels * chunks, chunks, lines.panels, scratch, sums_at,
            4 * spread.x_image, channels_at.data_ptr(), 4 * spread.y_image, 4 * y_plane,
            weights.rows, weights.groups, blocks, starts.data_ptr(), offsets.data_ptr(),
            weights.values_EG.data_ptr(), channels, 4 * lines.channel,
            table.data_ptr(), len(table), lines.pitch, lines.panel * window.stride[0], window.stride[1], high, wide,
            lines.vectors(lines.panel), lines.vectors(lines.last), places.data_ptr(), 8 * places[0].numel(),
            4 * lines.panel * out_wide, 4 * lines.out_high * out_wide, code, low_at, high_at, zeros_at(),
            order.data_ptr() if ordered else 0, *more,
        )  # fmt: skip
        return fixed, (table, places, channels_at)

    def part(first: int, last: int) -> Part:
        l0, l1, shift = first // out_wide, last // out_wide, 4 * first
        fixed, holds = numbers(replace(lines, out_high=l1 - l0), chunks, l0)
        return Part(fixed, (0, shift, 0, shift), holds)

    if runs:
        entry = runs_kernel.kernel(int(residual))
    else:
        entry = conv_kernel.kernel(weights.g, lines.pieces, int(residual), int(ordered))
    fixed, tables = numbers(lines, chunks, 0)
    threads = max(1, min(threads, fixed[0]))
    return laid_out(
        entry,
        addresses=3 + residual,
        absent=1 - residual,
        fixed=fixed,
        threads=threads,
        scratch_bytes=scratch * threads,
        holds=(*tables, offsets, starts, weights.values_EG, order),
        bands=Bands(work, out_pixels, lines.panel * out_wide, scratch, part) if images == 1 else None,
    )


def refuse_conv(weights: Stream, window: Window, groups: int) -> str | None:
    """Why these weights cannot be run as such a convolution; None when they can."""
    if weights.cols % window.taps:
        return f"a kernel of {window.kernel} needs a multiple of {window.taps} columns, the weights have {weights.cols}"
    if groups < 1 or weights.rows % groups:
        return f"{weights.rows} output channels do not fall into {groups} groups"
    if weights.rows // groups % weights.g and groups > 1:
        return f"groups of {weights.rows // groups} channels cut through {weights.g} rows that share their columns"
    if groups > 1 and weights.order_M is not None:
        group_NG = (weights.order_M // (weights.rows // groups)).view(-1, weights.g)
        if bool((group_NG != group_NG[:, :1]).any()):
            return f"{weights.g} rows that share their columns come from different groups of the convolution"
    return None


def sparse_conv(
    weights: Stream,
    x_NCHW: Tensor,
    window: Window,
    bias_M: Tensor | None = None,
    activation: str = "none",
    *,
    groups: int = 1,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve ordinary images by sparse weights: act(conv(x) + bias + residual).

    Args:
        weights: [M, C / groups * kernel height * kernel width], columns in the order of a flattened conv weight.
        x_NCHW: float32 [C, H, W] or [N, C, H, W], contiguous.
        window: kernel, stride, padding, dilation.
        bias_M: float32 [M].
        activation: as in `plan_conv`.
        groups: as in `plan_conv`.
        residual: added before the activation, in the shape of the result; may be `out` itself.
        out: where to write; made when None. It may not overlap x.

    Raises:
        FormatError: a shape, dtype, layout or overlap does not fit.
        UnknownName: no such activation.

    Example:
        >>> y = sparse_conv(weights, image, Window((3, 3), (2, 2), (1, 1, 1, 1)), bias, "relu")
    """
    need_bias(weights.rows, bias_M)
    if (refused := refuse_conv(weights, window, groups)) is not None:
        raise FormatError(refused)
    channels = weights.cols // window.taps * groups
    fits = x_NCHW.dim() in (3, 4) and x_NCHW.shape[-3] == channels
    need_floats("x", x_NCHW, f"[..., {channels}, H, W]", fits)
    (high, wide), images = x_NCHW.shape[-2:], x_NCHW.shape[0] if x_NCHW.dim() == 4 else 1
    out_high, out_wide = window.output(high, wide)
    out = output(out, (*x_NCHW.shape[:-3], weights.rows, out_high, out_wide), (x_NCHW, bias_M), (residual,))
    if residual is not None:
        need_floats("residual", residual, str(list(out.shape)), residual.shape == out.shape)
    if out.numel():
        planned = _planned(weights, images, high, wide, window, groups, activation, residual is not None)
        run_on(planned, x_NCHW, out, bias_M, residual)
    return out


def _planned(
    weights: Stream, images: int, high: int, wide: int, window: Window, groups: int, activation: str, residual: bool
) -> Launch:
    """The plan for this size of ordinary images, remembered with the weights."""
    threads = torch.get_num_threads()
    key = ("conv", images, high, wide, window, groups, activation, residual, threads, weights.addresses)
    if (found := weights.plans.get(key)) is None:
        out_high, out_wide = window.output(high, wide)
        found = plan_conv(
            weights, images, high, wide, window, groups=groups, activation=activation, residual=residual,
            threads=threads, strides=(high * wide, out_high * out_wide),
        )  # fmt: skip
        remember(weights, key, found)
    return found


def spmm_conv(
    weights: Stream,
    x_CHW: Tensor,
    kernel: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    bias_M: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """`sparse_conv` with stride 1 and the same padding on opposite sides.

    Example:
        >>> y = spmm_conv(weights, image, (3, 3), (1, 1), bias, "relu")
    """
    return sparse_conv(weights, x_CHW, Window(kernel, padding=(*padding, *padding)), bias_M, activation, out=out)
