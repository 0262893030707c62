"""Image planes: how the whole-network runtime keeps images, [images, channels, plane stride].

A plane holds the pixels of one channel, row by row without a halo, padded to whole vectors.
"""

from __future__ import annotations

# A vector of AVX-512, the widest there is: 16 floats, one cache line.
_LINE = 16
# First-level caches of 48 KiB in 12 ways have 64 sets of 64 bytes: planes this many floats apart share one set.
_ALIAS = 1024


def plane_stride(pixels: int) -> int:
    """Floats from one channel's plane to the next: whole cache lines, and never so that all channels share few sets.

    Example:
        >>> plane_stride(14 * 14), plane_stride(32 * 32)
        (208, 1040)
    """
    stride = -(-max(pixels, 1) // _LINE) * _LINE
    return stride + _LINE if stride % (_ALIAS // 4) == 0 else stride
