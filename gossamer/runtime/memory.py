"""Memory planned once: buffers that are never needed at the same time share addresses.

Largest first, each goes to the lowest address at which it meets no buffer that lives while it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# A cache line, and the width of an AVX-512 vector.
ALIGN = 64


@dataclass(eq=False)
class Buffer:
    """Memory for one activation.

    Args:
        nbytes: its size.
        first: the step that writes it.
        last: the last step that reads it.
        offset: where it lies in the arena, once planned.
        address: where it lies in memory, while recording or once bound.
    """

    nbytes: int
    first: int = -1
    last: int = -1
    offset: int = -1
    address: int = 0
    keep: object = field(default=None, repr=False)

    def seen(self, step: int) -> None:
        """A step reads or writes it."""
        self.first = step if self.first < 0 else self.first
        self.last = max(self.last, step)


def assign(buffers: Iterable[Buffer]) -> int:
    """Give every buffer an offset; returns the bytes of the arena.

    Example:
        >>> a, b, c = Buffer(64, 0, 1), Buffer(128, 1, 2), Buffer(64, 2, 3)
        >>> assign([a, b, c]), a.offset == c.offset
        (192, True)
    """
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.first)):
        offset = 0
        alive = [p for p in placed if p.first <= buffer.last and buffer.first <= p.last]
        for other in sorted(alive, key=lambda p: p.offset):
            if offset + buffer.nbytes <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.nbytes))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + _aligned(buffer.nbytes))
    return total


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
