"""Masked: the parametrization that makes a weight sparse in the forward pass."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.shrink import Shrink, hard, straight_through
from ..core.support import Support


class Masked(nn.Module):
    """weight = shrink(original, support). The mask is a buffer, so it lives in `state_dict`.

    Args:
        kept: the support, in the layout the weight is stored in.
        shrink: what becomes of the values and of their gradient; `hard` keeps or zeroes them.

    While `listening`, the gradient of the dense weight reaches the original: same forward, no cut on the way back.
    """

    def __init__(self, kept: Tensor, shrink: Shrink = hard) -> None:
        super().__init__()
        self.register_buffer("mask", kept)
        self.shrink = shrink
        self.listening = False

    def forward(self, original: Tensor) -> Tensor:
        rule = straight_through if self.listening else self.shrink
        return rule(original, Support(self.mask))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight
