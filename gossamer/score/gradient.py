"""Scores from the loss's gradient, taken once before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.core import Stats
from gossamer.core.ranks import mean_over_ranks
from gossamer.core.stats import statistic

from .trial import Trial, inside, require_reached


def gradient_times_weight(w: Tensor, stats: Stats) -> Tensor:
    """|w·∂L/∂w|, in float32 or wider: what the loss would feel, to first order, if the entry were cut.

    Args:
        w: weight.
        stats: needs "gradient" of the weight's shape, see `loss_gradient`.

    Raises:
        CalibrationError: "gradient" is missing or of another layer; pass data and a loss.
        NonFiniteError: "gradient" holds NaN or infinity.

    Example:
        >>> w, g = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]])
        >>> gradient_times_weight(w, {"gradient": g}).tolist()
        [[1.0, 3.0]]

    Reference: Lee et al., SNIP, arXiv:1810.02340.
    Departs from: the paper divides by the sum over the model; ranks are the same.
    """
    return times(w, statistic(stats, "gradient", w.shape)).abs()


def times(w: Tensor, x: Tensor) -> Tensor:
    """w·x in float32, or in float64 where either is: half precision ties what differs."""
    wide = torch.promote_types(torch.promote_types(w.dtype, x.dtype), torch.float32)
    return w.detach().to(wide) * x.to(w.device, wide)


def loss_gradient(model: nn.Module, weights: Mapping[str, Tensor], trial: Trial) -> dict[str, dict[str, Tensor]]:
    """{"gradient": ∂L/∂w} of each weight, the mean over batches and ranks, in the mode the model is in.

    Args:
        weights: parameter name → the values to stand for it. The model itself is left as it was.
        trial: data and loss.

    Raises:
        CalibrationError: the model or the loss fails, or a weight has no part in the loss.
    """
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    mean = inside(model, leaves, lambda m: mean_gradient(m, leaves, trial))
    return {n: {"gradient": g} for n, g in mean.items()}


def mean_gradient(
    model: nn.Module, leaves: Mapping[str, Tensor], trial: Trial, temperature: float = 1.0
) -> dict[str, Tensor]:
    """∂L/∂w of each leaf, the mean over batches and ranks."""
    total = {n: torch.zeros_like(w) for n, w in leaves.items()}
    reached: set[str] = set()
    for batch in trial.batches:
        loss = trial.value(model, batch, temperature)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for n, g in zip(leaves, found):
            if g is not None:
                total[n] += g / len(trial.batches)
                reached.add(n)
    require_reached(leaves, reached)
    return mean_over_ranks(total)


def gradient_flow(w: Tensor, stats: Stats) -> Tensor:
    """w·(H g), signed, in float32 or wider: cutting the entry changes gᵀg, to first order, by −2 times this.

    So entries of high worth are those whose loss would make training slower, and those below 0 are in its way.

    Args:
        w: weight.
        stats: needs "hessian_gradient" of the weight's shape, see `HessianGradient`.

    Raises:
        CalibrationError: "hessian_gradient" is missing or of another layer; pass data and a loss.
        NonFiniteError: it holds NaN or infinity.

    Example:
        >>> w, x = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]])
        >>> gradient_flow(w, {"hessian_gradient": x}).tolist()
        [[1.0, -3.0]]

    Reference: Wang et al., GraSP, arXiv:2002.07376.
    Departs from: the paper's score is the negative of this one, and its highest are pruned.
    """
    return times(w, statistic(stats, "hessian_gradient", w.shape))


@dataclass(frozen=True)
class HessianGradient:
    """A probe: {"hessian_gradient": H g} of each weight, g the mean gradient and H the mean Hessian over the batches.

    Args:
        temperature: outputs are divided by it before the loss, so that its softmax is nearly flat.
    """

    temperature: float = 200.0

    def __call__(self, model: nn.Module, weights: Mapping[str, Tensor], trial: Trial) -> dict[str, dict[str, Tensor]]:
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        found = inside(model, leaves, lambda m: self._product(m, leaves, trial))
        return {n: {"hessian_gradient": x} for n, x in found.items()}

    def _product(self, model: nn.Module, leaves: Mapping[str, Tensor], trial: Trial) -> dict[str, Tensor]:
        total = {n: torch.zeros_like(w) for n, w in leaves.items()}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            g = mean_gradient(model, leaves, trial, self.temperature)
            for batch in trial.batches:
                loss = trial.value(model, batch, self.temperature)
                again = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
                dot = sum((a * g[n]).sum() for n, a in zip(leaves, again) if a is not None)
                products = torch.autograd.grad(dot, list(leaves.values()), allow_unused=True)
                for n, x in zip(leaves, products):
                    if x is not None:
                        total[n] += x / len(trial.batches)
        return mean_over_ranks(total)
