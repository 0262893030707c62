"""Random: worth by lot, the same lot on every device and every rank."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import Stats


def salt(name: str) -> Tensor:
    """A layer's name → the scalar to pass as `stats["salt"]`, so that equal shapes still draw different lots."""
    return torch.tensor(zlib.crc32(name.encode()))


@dataclass(frozen=True)
class Random:
    """Uniform on [0, 1), drawn from a generator on the CPU seeded by (seed, salt).

    Args:
        seed: the run's seed. `stats["salt"]`, where present, separates layers: see `salt`.

    Law: same seed, salt and shape → same scores, on any device and in any dtype of the weight.

    Example:
        >>> w = torch.ones(2, 2)
        >>> bool((random(3)(w, {}) == random(3)(w, {})).all())
        True
    """

    seed: int = 0

    def __call__(self, w: Tensor, stats: Stats) -> Tensor:
        lot = int(stats["salt"]) if "salt" in stats else 0
        # An odd multiplier keeps (seed, salt) pairs apart; the generator takes 63 bits.
        seed = (self.seed * 0x9E3779B97F4A7C15 + lot) % (1 << 63)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(w.shape, generator=generator).to(w.device)


def random(seed: int = 0) -> Random:
    """Scores drawn by lot from `seed`."""
    return Random(seed)
