"""A layer's Gram matrix, scaled and taken apart into eigenvectors, so that it can be inverted for any shift.

Shape suffixes: K input columns, M output rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.core.errors import BudgetError, CalibrationError

_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Gram matrix → (its version, damping, spectrum); dies with it


@dataclass(frozen=True)
class Spectrum:
    """H = S⁻¹(G + λI)S⁻¹ with a unit diagonal, and H = Q·diag(L)·Qᵀ.

    Args:
        h_KK: the scaled matrix H.
        values_K: eigenvalues L, > 0.
        vectors_KK: eigenvectors Q, one per column.
        scale_K: the diagonal of S, > 0. Weights are multiplied by it, so that errors stay what they were.
    """

    h_KK: Tensor
    values_K: Tensor
    vectors_KK: Tensor
    scale_K: Tensor

    def solve(self, x_MK: Tensor, shift: float) -> Tensor:
        """x·(H + shift·I)⁻¹."""
        return ((x_MK @ self.vectors_KK).div_(self.values_K + shift)) @ self.vectors_KK.t()

    def to(self, device: torch.device, dtype: torch.dtype) -> Spectrum:
        """The same elsewhere, or in another precision."""
        return replace(self, **{name: x.to(device, dtype) for name, x in vars(self).items()})


def spectrum(gram_KK: Tensor, *, damping: float = 0.01) -> Spectrum:
    """Scale and decompose in float64, once for all layers that share the Gram matrix.

    Args:
        gram_KK: mean over tokens of x xᵀ; finite, symmetric.
        damping: λ as a share of the mean of the live diagonal, > 0.

    Raises:
        BudgetError: damping is not positive.
        CalibrationError: all inputs are dead.
    """
    if damping <= 0:
        raise BudgetError(f"damping is a share of the mean diagonal and must be > 0, got {damping}; try 0.01")
    version, used, found = _known.get(gram_KK, (None, None, None))
    if found is None or (version, used) != (gram_KK._version, damping):
        found = _decompose(gram_KK.double(), damping)
        _known[gram_KK] = gram_KK._version, damping, found
    return found


def _decompose(g_KK: Tensor, damping: float) -> Spectrum:
    live_K = g_KK.diagonal() > 0
    if not bool(live_K.any()):
        raise CalibrationError(
            f"all {len(g_KK)} inputs of this layer were 0 on the calibration data, so nothing can be compensated; "
            "pass data that reach this layer, or skip it"
        )
    shift = damping * float(g_KK.diagonal()[live_K].mean())
    scale_K = (g_KK.diagonal() + shift).sqrt()
    h_KK = g_KK / (scale_K[:, None] * scale_K)
    h_KK.diagonal().fill_(1.0)
    values_K, vectors_KK = torch.linalg.eigh(h_KK)
    return Spectrum(h_KK, values_K.clamp(min=0), vectors_KK, scale_K)
