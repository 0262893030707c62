"""LowRank: a delta that is a product of two thin matrices, LoRA's.

Shape suffixes: B positions, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .delta import Delta, trained


class LowRank(Delta):
    """w + scale·B·A.

    Args:
        A: [R, I].
        B: [O, R].
        scale: factor of the product.
    """

    kind = "low_rank"

    def __init__(self, A: Tensor, B: Tensor, *, scale: float = 1.0) -> None:
        super().__init__()
        self.A, self.B, self.scale = trained(A), trained(B), scale

    def change(self, w: Tensor) -> Tensor:
        return (self.scale * self.B @ self.A).to(w.dtype)

    def product(self, x_BI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        small_BR = functional.linear(x_BI, self.A.to(x_BI.dtype))
        return functional.linear(x_BI, w_OI, bias_O) + functional.linear(small_BR, self._scaled(x_BI.dtype))

    def _scaled(self, dtype: torch.dtype) -> Tensor:
        """The factor goes onto the smallest operand."""
        return (self.B if self.scale == 1 else self.scale * self.B).to(dtype)

    def constants(self) -> dict[str, object]:
        return {"scale": self.scale}

    def low_rank(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * self.B.detach(), self.A.detach()

    @classmethod
    def joined(cls, parts: Sequence[tuple[Delta, float]]) -> LowRank:
        A = torch.cat([delta.A.detach() for delta, _ in parts])
        B = torch.cat([factor * delta.scale * delta.B.detach() for delta, factor in parts], 1)
        return cls(A, B)
