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
from gossamer.kernels.cpu.conv_columns import Columns
from gossamer.kernels.cpu.conv_entries import entries, run_entries
from gossamer.kernels.cpu.conv_layout import ALIGNED, FLAT, HALO, Lines
from gossamer.kernels.cpu.conv_plan import bounds_of, laid_out, run_on, zeros_at
from gossamer.kernels.cpu.launch import Launch
from gossamer.kernels.cpu.plan import remember
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.stream import Stream, stream
from gossamer.kernels.cpu.window import Window

# Packed lines of a panel may fill this much of a second-level cache of 1 MiB, and a block of channels this much of a
# first-level cache of 48 KiB, by rows of a group. Twenty entries pay for the start and end of a group's turn.
_L2_BYTES, _L1_BYTES, _WORTHWHILE = 1 << 19, {1: 28 << 10, 2: 28 << 10, 4: 40 << 10, 8: 40 << 10}, 20
# Where taps come in runs, tiles are high: they profit from panels of many lines, and from a block that fills the cache.
_RUNS_L2_BYTES, _RUNS_L1_BYTES = 1 << 20, 48 << 10


@dataclass(frozen=True)
class Tuning:
    """How a convolution is laid out; `None` decides by the weights.

    Args:
        mode: FLAT, ALIGNED or HALO (see `conv_layout`).
        block: channels of a block.
        panel: output lines of a panel.
    """

    mode: int | None = None
    block: int | None = None
    panel: int | None = None


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
    channels, runs = weights.cols // window.taps * groups, weights.runs and _wasted(out_wide, lanes()) < 2
    spread = spread or Spread(x_plane * channels, torch.arange(channels) * x_plane, y_plane * weights.rows)
    channels_at = 4 * spread.x_channels_C
    most = runs_kernel.HEIGHTS[-1] if runs else conv_kernel.widths(weights.g)[-1]
    work = weights.values_EG.numel() * out_pixels * images
    threads = max(1, min(threads, work // conv_plan.GRAIN))
    lines = _lines(
        weights, window, out_high, out_wide, channels, threads if images < threads else 1, tuning or Tuning(), runs
    )
    block = _block(weights, window, lines, most, tuning, runs)
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


def _lines(
    weights: Stream,
    window: Window,
    out_high: int,
    out_wide: int,
    channels: int,
    threads: int,
    tuning: Tuning,
    runs: bool,
) -> Lines:
    """Choose how columns are copied, and panels that fit the second-level cache and share out among threads."""
    from gossamer.kernels.cpu.target import lanes

    mode = _mode(weights.g, out_wide, lanes()) if tuning.mode is None else tuning.mode
    mode = ALIGNED if runs else mode
    most_bytes = _RUNS_L2_BYTES if runs else _L2_BYTES
    for panels in range(min(threads, out_high), out_high + 1):
        panel = tuning.panel or -(-out_high // panels)
        lines = (Columns if runs else Lines)(window, out_high, out_wide, mode, panel, lanes())
        if tuning.panel or 4 * channels * lines.channel <= most_bytes:
            break
    return lines


def _mode(g: int, out_wide: int, lanes: int) -> int:
    """Aligned loads for single rows, which do nothing but load; shared ones make room for other columns instead.

    Images narrower than a vector have their pixels one after the other.
    """
    if out_wide < lanes - 2:
        return FLAT
    return ALIGNED if g == 1 and _wasted(out_wide, lanes) < 1.25 else HALO


def _wasted(out_wide: int, lanes: int) -> float:
    """Lanes of whole vectors that cover a line, over its pixels."""
    return -(-out_wide // lanes) * lanes / out_wide


def _block(weights: Stream, window: Window, lines: Lines, most: int, tuning: Tuning | None, runs: bool) -> int:
    """Channels of a block: what a tile reads of them fills the first-level cache, unless the weights are too few."""
    if tuning is not None and tuning.block is not None:
        return tuning.block
    density = weights.indices_E.numel() / max(1, weights.groups * weights.cols)
    worth = round(_WORTHWHILE / max(density * window.taps, 1e-6))
    fits = _RUNS_L1_BYTES // (4 * lines.column(most)) if runs else _L1_BYTES[weights.g] // (4 * lines.reach(most))
    most_channels = max(1, worth, fits)
    # Blocks of one size, rather than a small one at the end.
    channels = max(1, weights.cols // window.taps)
    return -(-channels // -(-channels // most_channels))


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
