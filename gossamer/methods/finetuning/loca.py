"""LoCA: a change of weights that is sparse among cosines, with learned frequencies.

Shape suffixes: O outputs, I inputs, F frequencies, N coefficients; C is the orthonormal cosine transform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.attach.delta import Adapter, Delta, Place, trained
from gossamer.core import method
from gossamer.core.errors import BudgetError, TargetError
from gossamer.score import salt

CYCLE, FIRST = 30, 10  # steps of a cycle, and those of coefficients, which come first
FARTHEST = 0.999  # a place's largest share of its axis, as the official code has it


@lru_cache(maxsize=64)
def cosines(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II as a matrix: C[f, t] = √(2/T)·cos(π·f·(2t + 1)/2T), and √(1/T) at f = 0; C·Cᵀ = 1.

    Args:
        size: T, the length of the axis.
    """
    t = torch.arange(size, dtype=torch.float64)
    c_FT = (math.pi * t[:, None] * (2 * t + 1) / (2 * size)).cos() * math.sqrt(2 / size)
    c_FT[0] = math.sqrt(1 / size)
    return c_FT.to(device, dtype)


class _Synthesis(torch.autograd.Function):
    """C_Oᵀ·S·C_I, S being 0 but for the coefficients; gradients of coefficients and of places."""

    @staticmethod
    def forward(ctx, coefficients_N: Tensor, places_2N: Tensor, outputs: int, inputs: int) -> Tensor:
        row_N, column_N = places_2N.round().long()
        c_OF, c_IF = (cosines(n, coefficients_N.dtype, coefficients_N.device) for n in (outputs, inputs))
        ctx.save_for_backward(coefficients_N, row_N, column_N)
        lines_OI = coefficients_N.new_zeros(outputs, inputs)
        lines_OI.index_add_(0, row_N, coefficients_N[:, None] * c_IF[column_N])
        return c_OF.t() @ lines_OI

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_OI: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        coefficients_N, row_N, column_N = ctx.saved_tensors
        c_OF, c_IF = (cosines(n, grad_OI.dtype, grad_OI.device) for n in grad_OI.shape)
        k_OI = c_OF @ grad_OI @ c_IF.t()
        places_2N = None
        if ctx.needs_input_grad[1]:
            along = torch.stack([_slope(k_OI, row_N, column_N), _slope(k_OI.t(), column_N, row_N)])
            places_2N = (coefficients_N * along).clamp(-1, 1)
        return k_OI[row_N, column_N] if ctx.needs_input_grad[0] else None, places_2N, None, None


def _slope(k_AB: Tensor, a_N: Tensor, b_N: Tensor) -> Tensor:
    """½·(K[a + 1, b] − K[a − 1, b]); at an edge the place itself stands for the one beyond."""
    last = k_AB.shape[0] - 1
    return (k_AB[(a_N + 1).clamp(max=last), b_N] - k_AB[(a_N - 1).clamp(min=0), b_N]) / 2


def synthesis(coefficients_N: Tensor, places_2N: Tensor, outputs: int, inputs: int) -> Tensor:
    """The inverse 2-D cosine transform of a spectrum that is 0 but at N places: Σ_n a_n·c_O[row_n] ⊗ c_I[column_n].

    With K the cosine transform of ∂L/∂ΔW, the gradient of a_n is K at its place; that of a place, along each axis, is
    a_n·½·(K one further − K one before), limited to ±1: what moving the coefficient by one would change.

    Args:
        coefficients_N: a; coefficients at the same place add up.
        places_2N: rows from 0 to O − 1 and columns from 0 to I − 1, rounded to whole numbers.

    Returns: ΔW_OI. It costs O·I·O + N·I products forward and O·I·(O + I) backward, once per pass, not per token.
    """
    with torch.autocast(coefficients_N.device.type, enabled=False):
        return _Synthesis.apply(coefficients_N, places_2N, outputs, inputs)


class Cosine(Delta):
    """w + scale·(the inverse cosine transform of `coefficients` at `places`).

    Places are shares of their axis, from 0 to 0.999, divided by `pace`. While steps < `moving`, coefficients learn in
    the first 10 steps of each cycle of 30 and places in the others; then places rest.

    Args:
        coefficients: [N].
        places: [2, N], rows and columns.
        scale: α.
        moving: steps in which places may move.
        pace: how much of an axis a step of 1 on a stored place is.
    """

    kind = "cosine"

    def __init__(
        self, coefficients: Tensor, places: Tensor, *, scale: float = 1.0, moving: int = 0, pace: float = 0.02
    ) -> None:
        super().__init__()
        self.coefficients, self.places = trained(coefficients), trained(places)
        self.scale, self.moving, self.pace = scale, moving, pace
        self.learning: Literal["coefficients", "places"] = "coefficients"
        self.register_load_state_dict_post_hook(_take_turn)

    def change(self, w: Tensor) -> Tensor:
        coefficients_N, places_2N = self.coefficients, self.places
        if self.learning == "places":
            coefficients_N = coefficients_N.detach()
        else:
            places_2N = places_2N.detach()
        last_21 = torch.tensor([[w.shape[0] - 1], [w.shape[1] - 1]], dtype=places_2N.dtype, device=places_2N.device)
        shares_2N = (places_2N * self.pace).clamp(0, FARTHEST)
        return (self.scale * synthesis(coefficients_N, shares_2N * last_21, *w.shape)).to(w.dtype)

    def advance(self, w: Tensor) -> None:
        _take_turn(self)
        resting = self.coefficients if self.learning == "places" else self.places
        resting.grad = None

    def constants(self) -> dict[str, object]:
        return {"scale": self.scale, "moving": self.moving, "pace": self.pace}

    @classmethod
    def joined(cls, parts: Sequence[tuple[Delta, float]]) -> Cosine:
        pace = parts[0][0].pace  # type: ignore[union-attr]
        coefficients = [factor * d.scale * d.coefficients.detach() for d, factor in parts]  # type: ignore[union-attr]
        places = [d.places.detach() * (d.pace / pace) for d, _ in parts]  # type: ignore[union-attr]
        return cls(torch.cat(coefficients), torch.cat(places, 1), pace=pace)


def _take_turn(delta: Cosine, *_: object) -> None:
    """Who learns in the coming step, from the steps that were taken."""
    step = int(delta.steps)
    turn = step < delta.moving and step % CYCLE >= FIRST
    delta.learning = "places" if turn else "coefficients"


@method("loca", paper="arXiv:2502.06820", site="delta", row="P080")
def loca(
    *,
    coefficients: int = 1000,
    scale: float = 1.0,
    total_steps: int | None = None,
    moving: int | None = None,
    pace: float = 0.02,
    seed: int = 0,
) -> Adapter:
    """Add to each frozen weight an inverse cosine transform of few coefficients, whose frequencies are learned too.

    w + α·C_Oᵀ·S·C_I, S being 0 but for N coefficients, which start at 0, at places that start by lot. Their gradients
    are those of the transform; a place gets ½·a·(K one further − K one before), K the cosine transform of ∂L/∂Δw, and
    is rounded when used. In cycles of 30 steps, 10 train coefficients and 20 train places, up to step `moving`.

    Only 3N numbers learn per weight, but Δw is made, and its gradient transformed, in every pass: unlike LoRA's it
    costs the dense weight's gradient. One optimizer serves both; train without weight decay, which draws places to 0.

    Args:
        coefficients: N, per weight.
        scale: α.
        total_steps: length of the run; only for `moving`. Unit: optimizer steps.
        moving: steps in which places may move; a tenth of total_steps unless given, 0 if that is not given either.
        pace: a step of 1 on a stored place is this share of its axis. 0.02 makes one learning rate of 5e-3 what the
            official code's two are, 5e-3 and 1e-4.
        seed: of the places; layers draw different ones.

    Raises:
        BudgetError: no coefficients, more than the weight has entries, or moving or pace out of range.
        TargetError: a target is a convolution.

    Example:
        >>> loca(coefficients=5).make(torch.ones(6, 8), Place(torch.nn.Identity(), "")).change(torch.ones(6, 8)).sum()
        tensor(0., grad_fn=<SumBackward0>)

    Reference: Du et al., LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning, arXiv:2502.06820.
    Departs from: the product with dense cosine matrices skips the one with S; a place that does not learn gets no
        gradient instead of a switched-off parameter; the official schedule counts forward passes, this one steps of the
        optimizer, so that micro-batches do not shorten it.
    """
    last = _moving(total_steps, moving)
    if coefficients < 1 or not pace > 0:
        raise BudgetError(f"loca needs at least one coefficient and a pace above 0, got {coefficients} and {pace}")

    def make(w_OI: Tensor, place: Place) -> Delta:
        if w_OI.dim() != 2:
            raise TargetError(f"loca changes linear layers; {place.layer!r} has a weight of shape {tuple(w_OI.shape)}")
        if coefficients > w_OI.numel():
            raise BudgetError(f"{place.layer!r} has {w_OI.numel()} entries, fewer than {coefficients} coefficients")
        lots = torch.Generator().manual_seed(seed * 0x9E3779B1 + int(salt(place.layer)))
        wide = torch.promote_types(w_OI.dtype, torch.float32)
        places_2N = torch.rand(2, coefficients, generator=lots).to(w_OI.device, wide) / pace
        return Cosine(w_OI.new_zeros(coefficients), places_2N, scale=scale, moving=last, pace=pace)

    return Adapter("loca", make)


def _moving(total_steps: int | None, moving: int | None) -> int:
    last = round(0.1 * (total_steps or 0)) if moving is None else moving
    if last < 0 or (total_steps is not None and last > total_steps):
        raise BudgetError(f"moving is a number of steps from 0 to the run's {total_steps}, got {last}")
    return last
