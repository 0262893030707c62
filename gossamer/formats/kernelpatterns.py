"""Kernel patterns: convolution kernels that keep one of a few sets of taps, stored by the set's number.

Shapes: M output channels, C input channels, P patterns, E kept kernels, S kept weights; K = C * taps columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.formats.checks import (
    column_part,
    exactly,
    floats,
    index_dtype,
    kept,
    owners,
    pointer,
    pointer_part,
    sized,
    whole,
)
from gossamer.formats.format import Format

MOST_PATTERNS = 255


@dataclass(frozen=True, eq=False, repr=False)
class KernelPatterns(Format):
    """Kernels by input channel and pattern; a pattern says which of the kernel's taps are kept.

    Bytes: 4 (M + 1) + E (i + 1) + P taps + S b: one index per kernel instead of one per weight. The CPU convolution
    computes taps that stand below each other together, so each loaded vector serves up to three of them.

    Example:
        >>> w = torch.tensor([[1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 4.0]])  # three kernels of three taps
        >>> stored = KernelPatterns.from_dense(w, taps=3)
        >>> stored.channels.tolist(), stored.patterns.int().tolist()
        ([0, 2], [[1, 0, 1]])
    """

    name: ClassVar[str] = "kernelpatterns"
    PARTS: ClassVar[tuple[str, ...]] = ("indptr", "channels", "kinds", "patterns", "values")
    OPTIONS: ClassVar[tuple[str, ...]] = ("rows", "cols", "taps")

    rows: int
    cols: int
    taps: int
    indptr: Tensor
    channels: Tensor
    kinds: Tensor
    patterns: Tensor
    values: Tensor

    @classmethod
    def from_dense(cls, w_MK: Tensor, support_mask: Tensor | None = None, *, taps: int = 9) -> Self:
        """Store a convolution's weight, flattened to [M, C * taps].

        Args:
            taps: weights of one kernel; must divide K.

        Raises:
            FormatError: K is no multiple of taps, or the kernels have more than 255 patterns; store it as csr.
        """
        w_MK, mask_MK = kept(w_MK, support_mask)
        rows, cols = w_MK.shape
        _check_taps(cols, taps)
        mask_MCt = mask_MK.view(rows, cols // taps, taps)
        kept_MC = mask_MCt.any(-1)
        channels = kept_MC.view(-1).nonzero().squeeze(1) % max(cols // taps, 1)
        patterns, kinds = _numbered(mask_MCt[kept_MC])
        values = w_MK.reshape(-1)[mask_MK.view(-1)]
        return cls(rows, cols, taps, pointer(kept_MC.sum(1)), channels.to(index_dtype(cols)), kinds, patterns, values)

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        rows, cols, taps = whole(meta, "rows"), whole(meta, "cols"), whole(meta, "taps", 1)
        _check_taps(cols, taps)
        indptr, channels, kinds, patterns, values = exactly(parts, cls.PARTS)
        pointer_part(indptr, rows, channels.numel())
        column_part(channels, indptr, cols // taps, index_dtype(cols), "channels")
        sized(kinds, "kinds", torch.uint8, [channels.numel()])
        count = len(patterns) if patterns.dim() == 2 else 0
        sized(patterns, "patterns", torch.bool, [count, taps])
        if count > MOST_PATTERNS or not bool(patterns.any(1).all()):
            raise FormatError(f"patterns must be at most {MOST_PATTERNS} sets of at least one tap; these are damaged")
        if kinds.numel() and int(kinds.max()) >= count:
            raise FormatError(f"kinds must lie below the {count} patterns, got {int(kinds.max())}; these are damaged")
        stored = int(patterns.sum(1)[kinds.long()].sum())
        return cls(rows, cols, taps, indptr, channels, kinds, patterns, floats(values, [stored]))

    @property
    def nnz(self) -> int:
        """Kept entries, explicit zeros included."""
        return self.values.numel()

    def slots(self) -> Tensor:
        first_E = owners(self.indptr, self.channels.numel()) * self.cols + self.channels.long() * self.taps
        places_Et = first_E.unsqueeze(1) + torch.arange(self.taps, device=self.device)
        return places_Et[self.patterns[self.kinds.long()]]


def _check_taps(cols: int, taps: int) -> None:
    if taps < 1 or cols % taps:
        raise FormatError(f"kernels of {taps} taps need a multiple of {taps} columns, got K={cols}; taps is kh * kw")


def _numbered(mask_Et: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of a mask, bool [P, taps], and each row's number among them, uint8 [E]."""
    bits = np.packbits(mask_Et.cpu().numpy(), axis=1)
    _, first, kind_E = np.unique(bits.view(f"V{bits.shape[1]}").ravel(), return_index=True, return_inverse=True)
    if len(first) > MOST_PATTERNS:
        raise FormatError(
            f"the kernels keep {len(first)} different sets of taps, {MOST_PATTERNS} can be stored; prune with patterns "
            "from a dictionary first, or store it as csr"
        )
    patterns = mask_Et[torch.from_numpy(first).to(mask_Et.device)]
    return patterns, torch.from_numpy(kind_E.astype(np.uint8)).to(mask_Et.device)
