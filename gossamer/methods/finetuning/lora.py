"""LoRA: the change of a weight is a product of two thin matrices. What the sparse methods are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gossamer.attach.delta import Adapter, Delta, Place
from gossamer.attach.low_rank import LowRank
from gossamer.core import method
from gossamer.core.errors import BudgetError, TargetError
from gossamer.score import salt


@method("lora", paper="arXiv:2106.09685", site="delta")
def lora(*, rank: int = 8, alpha: float | None = None, seed: int = 0) -> Adapter:
    """Add a low-rank product to each frozen weight: w + α/r·B·A, with A by lot and B = 0.

    A [r, I] is uniform on ±1/√I, as peft has it, so that nothing changes before the first step.

    Args:
        rank: r, at least 1.
        alpha: α; equal to r unless given, which makes the factor 1.
        seed: of A; layers draw different lots.

    Raises:
        BudgetError: the rank is below 1.
        TargetError: a target is a convolution.

    Example:
        >>> lora(rank=4).make(torch.ones(6, 8), Place(torch.nn.Identity(), "")).A.shape
        torch.Size([4, 8])

    Reference: Hu et al., LoRA, arXiv:2106.09685.
    Departs from: no dropout; the official code starts A by Kaiming's rule with a = √5, which is the same range.
    """
    if rank < 1:
        raise BudgetError(f"lora needs a rank of 1 or more, got {rank}")
    scale = (rank if alpha is None else alpha) / rank

    def make(w_OI: Tensor, place: Place) -> Delta:
        if w_OI.dim() != 2:
            raise TargetError(
                f"lora changes linear layers, and {place.layer!r} has a weight of shape {tuple(w_OI.shape)}"
            )
        lots = torch.Generator().manual_seed(seed * 0x9E3779B1 + int(salt(place.layer)))
        A_RI = torch.empty(rank, w_OI.shape[1]).to(w_OI.dtype)
        nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=lots)
        return LowRank(A_RI, torch.zeros(w_OI.shape[0], rank, dtype=w_OI.dtype), scale=scale)

    return Adapter("lora", make)
