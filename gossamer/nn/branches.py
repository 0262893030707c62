"""Layers side by side."""

from __future__ import annotations

from torch import Tensor, nn


class Sum(nn.ModuleList):
    """Σ_j layer_j(x), of one layer or more.

    Example:
        >>> double = Sum([nn.Identity(), nn.Identity()])
        >>> double(torch.ones(2)).tolist()
        [2.0, 2.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self
        total = first(x)
        for layer in rest:
            total = total + layer(x)
        return total
