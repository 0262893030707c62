"""How a convolution by sparse weights reads its input: packed lines in which every kept weight is one offset.

A panel is a few lines of the output. For it, the lines of every input channel that it needs are copied once, strided
columns taken apart and zeros where the padding is, so that tap (ky, kx) of channel c stands at one fixed distance from
the output's own position. Three layouts differ in how they treat columns:

- FLAT: a copy per kx, lines as wide as the output: positions are the output's pixels one after the other.
- ALIGNED: the same with lines of whole vectors, so that no load crosses a cache line.
- HALO: one copy for all kx (of a stride's phase), lines with their padding, whose positions are dropped in the end.

Shapes: C channels, H and W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.window import Window

FLAT, ALIGNED, HALO = range(3)


@dataclass(frozen=True)
class Lines:
    """The packed lines of one panel, the same for every channel.

    Args:
        window: the window.
        out_high, out_wide: lines and columns of the output.
        mode: FLAT, ALIGNED or HALO.
        panel: output lines of a panel; the last may hold fewer.
        lanes: floats of a vector.
    """

    window: Window
    out_high: int
    out_wide: int
    mode: int
    panel: int
    lanes: int

    @property
    def _down(self) -> list[tuple[int, int]]:
        """Phase and line shift of every ky."""
        return [divmod(k * self.window.dilation[0], self.window.stride[0])[::-1] for k in range(self.window.kernel[0])]

    @property
    def _across(self) -> list[tuple[int, int, int]]:
        """First column, and shift into the copy, of every kx; taps with the same first column share a copy."""
        stride, left = self.window.stride[1], self.window.padding[1]
        reaches = [k * self.window.dilation[1] for k in range(self.window.kernel[1])]
        if self.mode != HALO:
            return [(reach - left, 0) for reach in reaches]
        return [(reach % stride - left, reach // stride) for reach in reaches]

    @property
    def pitch(self) -> int:
        """Floats from line to line."""
        if self.mode == ALIGNED:
            return -(-self.out_wide // self.lanes) * self.lanes
        return self.out_wide + max(shift for _, shift in self._across)

    @cached_property
    def _copies(self) -> dict[tuple[int, int], tuple[int, int]]:
        """For every (row phase, first column): where its lines start, in floats, and how many there are."""
        deep: dict[int, int] = {}
        for phase, shift in self._down:
            deep[phase] = max(deep.get(phase, 0), shift)
        copies, at = {}, 0
        for phase in sorted(deep):
            for first in sorted({first for first, _ in self._across}):
                copies[phase, first] = at, self.panel + deep[phase]
                at += (self.panel + deep[phase]) * self.pitch
        return copies

    @property
    def channel(self) -> int:
        """Floats from channel to channel: like planes, whole cache lines that do not all fall into the same sets."""
        return plane_stride(sum(count for _, count in self._copies.values()) * self.pitch)

    def taps(self) -> np.ndarray:
        """Floats from a position to what each tap (ky, kx) reads there; int64 [kernel height * kernel width]."""
        return np.array(
            [
                self._copies[phase, first][0] + down * self.pitch + across
                for phase, down in self._down
                for first, across in self._across
            ],
            dtype=np.int64,
        )

    def table(self) -> np.ndarray:
        """Of every packed line: input line (from the panel's first), first column, byte offset; int64 [lines, 3]."""
        top, stride = self.window.padding[0], self.window.stride[0]
        return np.array(
            [
                (line * stride + phase - top, first, 4 * (at + line * self.pitch))
                for (phase, first), (at, count) in self._copies.items()
                for line in range(count)
            ],
            dtype=np.int64,
        )

    def reach(self, vectors: int) -> int:
        """Floats of a channel that a register tile of so many vectors reads."""
        tile = vectors * self.lanes
        return sum(
            min(count * self.pitch, tile + (count - self.panel) * self.pitch) for _, count in self._copies.values()
        )

    @property
    def panels(self) -> int:
        """Panels of an image."""
        return -(-self.out_high // self.panel)

    def vectors(self, lines: int) -> int:
        """Vectors that cover `lines` output lines."""
        return -(-((lines - 1) * self.pitch + self.out_wide) // self.lanes)

    @property
    def last(self) -> int:
        """Output lines of the last panel."""
        return self.out_high - (self.panels - 1) * self.panel

    @property
    def pieces(self) -> int:
        """Into how many runs of output pixels a vector may fall apart."""
        return 1 if self.pitch == self.out_wide or self.mode == ALIGNED else -(-self.lanes // self.pitch) + 1

    def places(self) -> np.ndarray:
        """Where each vector's lanes go: byte offset into a plane of y, and bits of the lanes that belong there.

        int64 [panels, vectors, pieces, 2]; vectors that the last panel lacks have no bits.
        """
        found = np.zeros((self.panels, self.vectors(self.panel), self.pieces, 2), dtype=np.int64)
        lane = np.arange(self.lanes)
        for number in range(self.panels):
            lines = self.panel if number < self.panels - 1 else self.last
            position = np.arange(self.vectors(lines) * self.lanes).reshape(-1, self.lanes)
            line, column = np.divmod(position, self.pitch)
            real = (line < lines) & (column < self.out_wide)
            start = ((number * self.panel + line) * self.out_wide + column) - lane
            # Lanes of one run have one start; runs follow each other.
            fresh = np.zeros_like(start)
            fresh[:, 1:] = start[:, 1:] != start[:, :-1]
            run = fresh.cumsum(1)
            run -= np.where(real, run, 1 << 30).min(1, keepdims=True).clip(max=1 << 20)
            for piece in range(self.pieces):
                here = real & (run == piece)
                found[number, : len(position), piece, 1] = (here << lane).sum(1)
                first = np.where(here, start, 1 << 40).min(1)
                found[number, : len(position), piece, 0] = np.where(here.any(1), 4 * first, 0)
        return found
