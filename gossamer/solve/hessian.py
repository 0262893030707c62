"""From a layer's Gram matrix to the factor that optimal-brain-surgeon solvers walk along.

Shape suffixes: K input columns.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from gossamer.core.errors import BudgetError, CalibrationError

log = logging.getLogger(__name__)
RAISES = 4


def factor(gram_KK: Tensor, *, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """V, upper triangular, with VVᵀ = G + λI, and which inputs are dead.

    λ = damping · mean of the live diagonal. A dead input (diagonal 0) gets a 1 there, so nothing divides by 0.
    The Cholesky runs from the last row up and in float64. Its inverse U = V⁻¹ is what SparseGPT calls the upper
    Cholesky factor of H⁻¹: UᵀU = (G + λI)⁻¹.

    Args:
        gram_KK: mean over tokens of x xᵀ; finite, symmetric.
        damping: share of the mean diagonal, > 0.

    Raises:
        BudgetError: damping is not positive.
        CalibrationError: all inputs are dead, or no damping up to 10⁴ times the asked one makes G positive
            definite; use more calibration tokens, or float32 activations.
    """
    if damping <= 0:
        raise BudgetError(f"damping is a share of the mean diagonal and must be > 0, got {damping}; try 0.01")
    h_KK = gram_KK.double()
    dead_K = h_KK.diagonal() == 0
    if bool(dead_K.all()):
        raise CalibrationError(
            f"all {len(h_KK)} inputs of this layer were 0 on the calibration data, so nothing can be compensated; "
            "pass data that reach this layer, or skip it"
        )
    mean = float(h_KK.diagonal()[~dead_K].mean())
    for power in range(RAISES + 1):
        v_KK = _factor(h_KK, dead_K, damping * 10**power * mean)
        if v_KK is not None:
            return v_KK, dead_K
        log.warning("Hessian of %d inputs is singular at damping %g; raising it ×10", len(h_KK), damping * 10**power)
    raise CalibrationError(
        f"the Hessian of {len(h_KK)} inputs is not positive definite even at damping {damping * 10**RAISES:g}; "
        "use more calibration tokens, collect the Gram matrix in float32, or pass a larger damping="
    )


def _factor(h_KK: Tensor, dead_K: Tensor, shift: float) -> Tensor | None:
    damped_KK = h_KK.flip(0, 1)
    damped_KK.diagonal().add_(dead_K.flip(0).double()).add_(shift)
    lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
    return None if int(info) else lower_KK.flip(0, 1)
