"""Bands: a launch on the planes of one image, cut into runs of output pixels that can be done apart.

A thread that does the same band of the image in every layer finds most of what it reads in its own caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gossamer.kernels.cpu.window import Window

# Of a step in a list of kernel calls: where its kernel (none: nothing to do) and its argument block lie, and flags.
STEP_BYTES = 24
# Floats of a cache line, and how far from its share of the pixels a band may end so as to end with one.
_LINE, _ASIDE = 16, 0.15
# The flags: the threads meet after the step; several threads take their tasks from its block.
MEET, SHARED = 1, 2


@dataclass(frozen=True)
class Part:
    """One band of a launch.

    Args:
        fixed: its fixed numbers, in place of the launch's.
        shifts: bytes to add to the addresses, in their order.
        holds: whatever must live as long as the addresses among the fixed numbers.
    """

    fixed: tuple[int, ...]
    shifts: tuple[int, ...] = ()
    holds: tuple = ()


@dataclass(frozen=True)
class Bands:
    """How a launch falls apart.

    Args:
        work: multiply-adds of the whole launch.
        pixels: output pixels of a plane.
        unit: pixels; bands start at its multiples.
        scratch_bytes: scratch memory of one band.
        part: makes the band of pixels first..last - 1.
    """

    work: int
    pixels: int
    unit: int
    scratch_bytes: int
    part: Callable[[int, int], Part]

    def edges(self, threads: int) -> list[int]:
        """Pixels at which the bands of so many threads begin, and the end.

        Threads that write parts of one cache line wait for each other, so bands rather begin with one.

        Example:
            >>> Bands(0, 49, 16, 0, Part).edges(2)
            [0, 32, 49]
            >>> Bands(0, 14 * 14, 14, 0, Part).edges(2)
            [0, 112, 196]
        """
        return [min(self._cut(t, threads), self.pixels) for t in range(threads)] + [self.pixels]

    def _cut(self, thread: int, threads: int) -> int:
        even = -(-(thread * self.pixels) // (threads * self.unit)) * self.unit
        for cut in (even, even + self.unit, even - self.unit):
            aside = abs(threads * cut - thread * self.pixels)
            if cut % _LINE == 0 and aside <= _ASIDE * self.pixels:
                return cut
        return even


def lines_read(window: Window, high: int, first: int, last: int) -> tuple[int, int]:
    """Input lines that output lines first..last - 1 of an image of this height read.

    Example:
        >>> lines_read(Window((3, 3), (2, 2), (1, 1, 1, 1)), 8, 2, 4)
        (3, 8)
    """
    above, step = window.padding[0], window.stride[0]
    top = min(max(0, first * step - above), high)
    return top, max(top, min(high, (last - 1) * step - above + (window.kernel[0] - 1) * window.dilation[0] + 1))
