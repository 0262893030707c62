"""Layers whose weights stay on a grid while they learn: rounded in every pass, or by their scales alone.

Shape suffixes: M rows, K columns, C runs of weights that share a scale, w weights of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..attach.targets import Target
from ..formats.shared_grid import SharedGrid

BETAS = (0.9, 0.95)


class OnGrid:
    """One layer, whose kept weights are on the grid.

    Args:
        kept_MK: its support.
        dense_MK: what kept weights start to learn from.
        bits, width: of the grid.
    """

    def __init__(
        self, model: nn.Module, target: Target, kept_MK: Tensor, dense_MK: Tensor, *, bits: int, width: int
    ) -> None:
        self.model, self.target = model, target
        self.kept_MK, self.dense_MK = kept_MK, dense_MK
        self.grid = SharedGrid.of(kept_MK, bits=bits, width=width)

    def learn_weights(self) -> list[nn.Parameter]:
        """Dense values come back and compute rounded; returns what learns."""
        self.target.write(self.model, torch.where(self.kept_MK, self.dense_MK, 0))
        return [self._hold(_Rounded(self.grid, self.kept_MK, self.target.transposed))]

    def learn_scales(self) -> list[nn.Parameter]:
        """Codes stay, scales and lowest values compute; returns what learns."""
        how = _Scaled(self.grid, self.target.weight(self.model), self.target.transposed)
        self._hold(how).requires_grad_(False)
        return [how.values]

    def release(self) -> None:
        """The weight is what it computed last."""
        parametrize.remove_parametrizations(self.target.module(self.model), self.target.tensor)

    def _hold(self, how: nn.Module) -> nn.Parameter:
        module, name = self.target.module(self.model), self.target.tensor
        parametrize.register_parametrization(module, name, how, unsafe=True)
        return module.parametrizations[name].original.requires_grad_()


class _Rounded(nn.Module):
    """The nearest weights on the grid; the gradient passes as if they were the weights, where they are kept."""

    def __init__(self, grid: SharedGrid, kept_MK: Tensor, transposed: bool) -> None:
        super().__init__()
        self.grid, self.kept_MK, self.transposed = grid, kept_MK, transposed

    def forward(self, stored: Tensor) -> Tensor:
        w_MK = stored.t() if self.transposed else stored
        # What is added is exactly 0, so that the forward pass sees the grid to the bit.
        new_MK = self.grid.rounded(w_MK).to(w_MK.dtype) + (w_MK - w_MK.detach()) * self.kept_MK
        return new_MK.t() if self.transposed else new_MK


class _Scaled(nn.Module):
    """low + scale·code with the codes as they are; low and scale learn, in bfloat16 as they will be stored."""

    def __init__(self, grid: SharedGrid, w_MK: Tensor, transposed: bool) -> None:
        super().__init__()
        self.grid, self.transposed = grid, transposed
        values_C2, self.codes_Cw = grid.encode(w_MK)
        self.values = nn.Parameter(values_C2.float())

    def forward(self, stored: Tensor) -> Tensor:
        # A negative scale would turn the order of the codes round.
        wanted_C2 = torch.stack([self.values[:, 0], self.values[:, 1].clamp(min=0)], 1)
        values_C2 = wanted_C2.detach().bfloat16().float() + (wanted_C2 - wanted_C2.detach())
        w_MK = self.grid.decode(values_C2, self.codes_Cw).to(stored.dtype)
        return w_MK.t() if self.transposed else w_MK


@dataclass(frozen=True)
class Learning:
    """Adam for some epochs over texts, in lots of `batch`: warm-up over a tenth of the steps, then linear to 0."""

    epochs: int
    lr: float
    batch: int
    order: torch.Generator

    def run(self, parameters: list[nn.Parameter], texts: int, loss_of: Callable[[Tensor], Tensor]) -> list[float]:
        """The loss at each step; `loss_of` gets the numbers of the texts at hand."""
        if not self.epochs:
            return []
        optimizer = torch.optim.Adam(parameters, self.lr, betas=BETAS)
        steps = self.epochs * -(-texts // self.batch)
        rise = max(1, steps // 10)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / rise, (steps - i) / steps))
        losses = []
        for _ in range(self.epochs):
            for rows in torch.randperm(texts, generator=self.order).split(self.batch):
                loss = loss_of(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                losses.append(float(loss.detach()))
        return losses
