"""Masked: the parametrization that makes a weight sparse in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.shrink import Shrink, fade_of, hard, straight_through
from ..core.support import Support


class Masked(nn.Module):
    """weight = shrink(original, support). The mask is a buffer, so it lives in `state_dict`.

    Args:
        kept: the support, in the layout the weight is stored in.
        shrink: what becomes of the values and of their gradient; `hard` keeps or zeroes them.
        two_way: hold a second support, `back`, for the gradient by the layer's inputs.

    While `listening`, the gradient of the dense weight reaches the original: same forward, no cut on the way back.
    Where the shrink rule fades with time, `fade` holds what is left now; as a buffer it leaves compiled graphs alone.
    """

    def __init__(self, kept: Tensor, shrink: Shrink = hard, *, two_way: bool = False) -> None:
        super().__init__()
        self.register_buffer("mask", kept)
        self.register_buffer("back", kept.clone() if two_way else None)
        fades = callable(fade_of(shrink))
        self.register_buffer("fade", torch.ones((), device=kept.device) if fades else None)
        self.shrink = shrink
        self.listening = False

    def forward(self, original: Tensor) -> Tensor:
        if self.fade is not None:
            return self.shrink(original, Support(self.mask), self.fade.to(original.dtype))  # type: ignore[call-arg]
        rule = straight_through if self.listening else self.shrink
        return rule(original, Support(self.mask))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight
