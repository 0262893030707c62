"""What a convolution's kernels read of its weights: where each stored weight finds its input in a packed panel.

Shapes: E stored entries, B blocks of channels, G row groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.kernels.cpu.conv_layout import Lines
from gossamer.kernels.cpu.stream import Stream
from gossamer.kernels.cpu.window import Window


@dataclass(frozen=True)
class _Entries:
    """Of every stored entry: its row group, its channel within the group of the convolution, its byte offset."""

    row_E: np.ndarray
    channel_E: np.ndarray
    offset_E: np.ndarray
    channels: int

    @classmethod
    def of(cls, weights: Stream, window: Window, groups: int, lines: Lines) -> _Entries:
        begin, end = weights.starts_BG[0].numpy(), weights.starts_BG[-1].numpy()
        row_E = np.repeat(np.arange(weights.groups), end - begin)
        column_E = weights.indices_E.to(torch.int32).numpy().astype(np.int64)
        each = weights.cols // window.taps
        channel_E, tap_E = np.divmod(column_E, window.taps)
        first_row = weights.places()[:: weights.g][: weights.groups].numpy()
        first_E = (first_row // max(1, weights.rows // groups) * each)[row_E]
        return cls(row_E, channel_E, 4 * ((channel_E + first_E) * lines.channel + lines.taps()[tap_E]), each)


def entries(weights: Stream, window: Window, groups: int, lines: Lines, block: int) -> tuple[Tensor, Tensor]:
    """Byte offsets of all entries into a packed panel, and where each (block, row group) starts among them."""
    found = _Entries.of(weights, window, groups, lines)
    blocks = max(1, -(-found.channels // block))
    counts = np.bincount(
        np.minimum(found.channel_E // block, blocks - 1) * weights.groups + found.row_E,
        minlength=blocks * weights.groups,
    ).reshape(blocks, weights.groups)
    begin = weights.starts_BG[0].numpy()
    starts = np.concatenate([begin[None], begin[None] + counts.cumsum(0)])
    return torch.from_numpy(found.offset_E.astype(np.int32)), torch.from_numpy(starts.astype(np.int32))


def run_entries(weights: Stream, window: Window, groups: int, lines: Lines, block: int) -> tuple[Tensor, Tensor]:
    """The runs of taps that `runs_tile` reads, and where those of each (block, length, row) start among them.

    Of groups of one row. Taps of one kernel that stand a line apart in the panel make a run, cut after three; within a
    block and row, runs of three come first, then those of two, then single taps.
    """
    from gossamer.kernels.cpu.runs_tile import LONGEST

    found = _Entries.of(weights, window, groups, lines)
    by_place = np.lexsort((found.offset_E, found.channel_E, found.row_E))
    row_E, channel_E, offset_E = (x[by_place] for x in (found.row_E, found.channel_E, found.offset_E))
    below_E = np.zeros(len(offset_E), dtype=bool)
    below_E[1:] = (row_E[1:] == row_E[:-1]) & (channel_E[1:] == channel_E[:-1])
    below_E[1:] &= offset_E[1:] - offset_E[:-1] == 4 * lines.pitch
    number_E = np.arange(len(offset_E))
    first_E = (number_E - np.maximum.accumulate(np.where(below_E, 0, number_E))) % LONGEST == 0
    taps_R = np.bincount(first_E.cumsum() - 1)
    at_R = number_E[first_E]
    blocks = max(1, -(-found.channels // block))
    block_R, row_R = np.minimum(channel_E[at_R] // block, blocks - 1), row_E[at_R]
    place_R = (block_R * weights.rows + row_R) * LONGEST + LONGEST - taps_R
    order_R = np.argsort(place_R, kind="stable")
    counts = np.bincount(place_R, minlength=blocks * weights.rows * LONGEST).reshape(-1, LONGEST)
    sizes = counts * np.arange(LONGEST + 1, 1, -1)  # of a record: its offset, and one weight per tap
    ends = sizes.cumsum().reshape(blocks, weights.rows, LONGEST)
    starts = np.concatenate([ends[..., :1] - sizes[:, 0].reshape(blocks, weights.rows, 1), ends], -1).transpose(0, 2, 1)
    records = _records(offset_E, 4 * by_place, at_R[order_R], taps_R[order_R])
    return torch.from_numpy(records), torch.from_numpy(np.ascontiguousarray(starts, dtype=np.int32))


def _records(offset_E: np.ndarray, weight_E: np.ndarray, at_R: np.ndarray, taps_R: np.ndarray) -> np.ndarray:
    """int32: of every run its first tap's offset, then the weights' offsets of its taps."""
    first_R = (taps_R + 1).cumsum() - taps_R - 1
    records = np.empty(int((taps_R + 1).sum()), dtype=np.int32)
    records[first_R] = offset_E[at_R]
    for tap in range(int(taps_R.max(initial=0))):
        longer_R = taps_R > tap
        records[first_R[longer_R] + 1 + tap] = weight_E[at_R[longer_R] + tap]
    return records
