"""The plain torch twin of products of 8-bit integers on panels.

Shapes: P panels, K inputs, M outputs, W positions of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.cpu.integers import LEVELS, SMALLEST, ZERO_POINT
from gossamer.kernels.reference.activation import activate


def quantise_rows(x: Tensor, scale: Tensor) -> Tensor:
    """round(x / scale), ties to even, as int8; 0 where the scale is 0."""
    return torch.where(scale > 0, x / scale, 0.0).round().clamp(-LEVELS, LEVELS).to(torch.int8)


def quantise_reference(x_PKW: Tensor) -> tuple[Tensor, Tensor]:
    """Panels as uint8 codes [P, K, W] and a scale per position [P, W]: x = scale (code - 128).

    scale = max over K of |x| / 127. Positions that are not finite have the scale NaN.

    Example:
        >>> quantise_reference(torch.tensor([[[1.0], [-0.5]]]))[0].tolist()
        [[[255], [64]]]
    """
    most_PW = x_PKW.abs().amax(1) if x_PKW.shape[1] else x_PKW.new_zeros(x_PKW.shape[0], x_PKW.shape[2])
    most_PW = torch.where(most_PW < SMALLEST, 0.0, most_PW)
    scales_PW = torch.where(most_PW.isfinite(), most_PW / LEVELS, torch.nan)
    inverse_PW = torch.where(scales_PW > 0, torch.full_like(most_PW, LEVELS) / most_PW, 0.0).double()
    # In float64, where the product is exact, so that only the rounding to an integer rounds.
    codes = (x_PKW.double() * inverse_PW[:, None]).nan_to_num(0.0, 0.0, 0.0).round()
    return (codes + ZERO_POINT).to(torch.uint8), scales_PW


def quantised_reference(
    w_MK: Tensor,
    codes_PKW: Tensor,
    scales_PW: Tensor,
    bias_M: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """act(W x + b) of a dense float weight quantised by rows and of quantised panels, summed exactly, float32."""
    scales_M = w_MK.float().abs().amax(1, keepdim=True) / LEVELS
    q_MK = quantise_rows(w_MK.float(), scales_M)
    sums = torch.einsum("mk,pkw->pmw", q_MK.double(), codes_PKW.double() - ZERO_POINT).float()
    z_PMW = sums * (scales_M * scales_PW[:, None])
    return activate(z_PMW if bias_M is None else z_PMW + bias_M[:, None], activation)
