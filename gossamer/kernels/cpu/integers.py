"""The 8-bit integers of quantised products: kernels compile these numbers in, and their torch twins use the same."""

from __future__ import annotations

# Symmetric: -127..127, and activations 128 up.
LEVELS, ZERO_POINT = 127, 128
# A position whose largest number is below this counts as zero: its reciprocal would overflow.
SMALLEST = 1e-30
