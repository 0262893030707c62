"""The packed panel of convolutions whose taps come in runs: columns one vector wide, line under line.

Every tap's lines are copied apart, as in the ALIGNED layout of `conv_layout`, but cut into columns, so that a register
tile of many lines reads one piece of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gossamer.kernels.cpu.conv_layout import Lines
from gossamer.kernels.cpu.planes import plane_stride


@dataclass(frozen=True)
class Columns(Lines):
    """The packed columns of one panel, the same for every channel."""

    @property
    def pitch(self) -> int:
        """Floats from line to line."""
        return self.lanes

    @property
    def across(self) -> int:
        """Columns of a line of the output."""
        return -(-self.out_wide // self.lanes)

    @property
    def depth(self) -> int:
        """Lines of a column."""
        return self.panel + max(shift for _, shift in self._down)

    @cached_property
    def _copies(self) -> dict[tuple[int, int], tuple[int, int]]:
        copies = sorted({(phase, first) for phase, _ in self._down for first, _ in self._across})
        return {copy: (number * self.depth * self.pitch, self.depth) for number, copy in enumerate(copies)}

    @property
    def strip(self) -> int:
        """Floats from column to column: all copies of one stand side by side."""
        return len(self._copies) * self.depth * self.pitch

    @property
    def channel(self) -> int:
        """Floats from channel to channel."""
        return plane_stride(self.across * self.strip)

    def column(self, lines: int) -> int:
        """Floats of a channel that a register tile of so many lines reads."""
        return len(self._copies) * (lines + self.depth - self.panel) * self.pitch

    def table(self) -> np.ndarray:
        """Of every column: input line (from the panel's first), first input column, byte offset; int64 [columns, 3]."""
        top, width = self.window.padding[0], self.lanes * self.window.stride[1]
        return np.array(
            [
                (phase - top, first + number * width, 4 * (at + number * self.strip))
                for (phase, first), (at, _) in self._copies.items()
                for number in range(self.across)
            ],
            dtype=np.int64,
        )

    def vectors(self, lines: int) -> int:
        """Vectors that cover `lines` output lines."""
        return lines * self.across

    def places(self) -> np.ndarray:
        """As in `Lines`, of vectors line by line: int64 [panels, vectors, 1, 2]."""
        line, column = np.divmod(np.arange(self.vectors(self.panel)), self.across)
        inside = column[:, None] * self.lanes + np.arange(self.lanes) < self.out_wide
        found = np.zeros((self.panels, len(line), 1, 2), dtype=np.int64)
        first_line = self.panel * np.arange(self.panels)[:, None]
        found[..., 0, 0] = 4 * ((first_line + line) * self.out_wide + column * self.lanes)
        found[..., 0, 1] = (inside << np.arange(self.lanes)).sum(1)
        found[-1, self.vectors(self.last) :] = 0
        return found
