"""How a convolution by sparse weights is laid out: layout of columns, lines of a panel, channels of a block."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.kernels.cpu.conv_columns import Columns
from gossamer.kernels.cpu.conv_layout import ALIGNED, FLAT, HALO, Lines
from gossamer.kernels.cpu.stream import Stream
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


def lines_of(
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
    return ALIGNED if g == 1 and wasted(out_wide, lanes) < 1.25 else HALO


def wasted(out_wide: int, lanes: int) -> float:
    """Lanes of whole vectors that cover a line, over its pixels."""
    return -(-out_wide // lanes) * lanes / out_wide


def block_of(weights: Stream, window: Window, lines: Lines, most: int, tuning: Tuning | None, runs: bool) -> int:
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
