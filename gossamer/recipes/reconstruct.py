"""Reconstruct: train the weights that a block kept until the block gives what the dense one gave.

A layer's solver minimises that layer's own error; what its block loses beyond its non-linearities, and what earlier
blocks lost already, only training through the block can make up for.

Shape suffixes: N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attach.blockwise import Call, first_tensor
from ..core.cut import cut
from ..core.errors import BudgetError


@dataclass(frozen=True)
class Reconstruct:
    """How a block is trained: Adam on its kept weights, norms and biases, the supports fixed.

    loss = mean over tokens of ‖y − ŷ‖²/‖y‖²: y is what the dense block gives on the dense model's activations, ŷ what
    the pruned one gives on the pruned model's, so errors of earlier blocks are corrected as well. Relative, because the
    norm that follows divides by a token's size, and a few tokens of most models are a thousand times the others'.

    Args:
        epochs: passes over the calibration batches; 0 trains nothing.
        lr: of Adam at its height, after the first tenth of the steps; it falls to 0 in a straight line.
        held_out: share of the batches that is not trained on; after each epoch, the weights best on them are noted, and
            those stay. At least one batch where there are two or more.
        betas: Adam's.
        bfloat16: multiply in bfloat16, with float32 sums, weights and slots.

    Raises:
        BudgetError: a number is out of range.

    Reference: Shin et al., EBFT, arXiv:2402.12419 (block by block); Wagner et al., arXiv:2510.14444 (what windows do).
    Departs from: both train on absolute errors; EBFT takes its targets from the pruned model's stream.
    """

    epochs: int = 3
    lr: float = 2e-3
    held_out: float = 0.125
    betas: tuple[float, float] = (0.9, 0.95)
    bfloat16: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lr <= 0 or not 0 <= self.held_out < 1:
            raise BudgetError(
                f"reconstruction needs epochs >= 0, lr > 0 and held_out in [0, 1), got {self.epochs}, {self.lr} and "
                f"{self.held_out}; try Reconstruct()"
            )

    def products(self, device: torch.device) -> AbstractContextManager[object]:
        """The precision that blocks run in."""
        return torch.autocast(device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, 0 … steps−1."""
        return self.lr * min(1.0, (step + 1) / (0.1 * steps)) * (1 - step / steps)


@dataclass(frozen=True)
class Fitted:
    """Loss of a block on the held-out batches (on all of them where none was held out).

    Args:
        before: as pruned.
        after: as it stays.
        epoch: the one that was best; 0 = as pruned.
    """

    before: float
    after: float
    epoch: int


def fit(
    parameters: Sequence[torch.nn.Parameter],
    masks: Sequence[Tensor | None],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    how: Reconstruct,
) -> Fitted:
    """Train a block's parameters in place; entries outside their masks stay zero.

    Args:
        parameters: what is trained, float.
        masks: the support of each, or None where all of it is trained.
        calls: the block on the pruned model's activations, one per batch.
        targets: what it should give.
    """
    device, held = parameters[0].device, _held_out(len(calls), how)
    train, rest = list(range(len(calls) - held)), list(range(len(calls) - held, len(calls))) or list(range(len(calls)))

    def loss(i: int) -> Tensor:
        with how.products(device):
            return relative_error(first_tensor(calls[i].run()), targets[i], calls[i].real)

    def judge() -> float:
        return sum(float(loss(i)) for i in rest) / len(rest)

    before = best = judge()
    kept, epoch, step = [p.detach().clone() for p in parameters], 0, 0
    optimizer = torch.optim.Adam(parameters, lr=how.lr, betas=how.betas, fused=True)
    order = torch.Generator().manual_seed(0)
    for now in range(1, how.epochs + 1):
        for i in torch.randperm(len(train), generator=order).tolist():
            optimizer.param_groups[0]["lr"] = how.rate(step, how.epochs * len(train))
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(i), parameters, allow_unused=True)
            for p, grad, mask in zip(parameters, grads, masks):
                p.grad = grad if mask is None or grad is None else cut(grad, mask)
            optimizer.step()
            step += 1
        if (score := judge()) < best:
            best, epoch, kept = score, now, [p.detach().clone() for p in parameters]
    for p, value in zip(parameters, kept):
        p.grad = None
        p.data.copy_(value)
    return Fitted(before, best, epoch)


def relative_error(y: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over real tokens of ‖target − y‖²/‖target‖²; features are the last axis."""
    y_ND, target_ND = (x.reshape(-1, x.shape[-1]).float() for x in (y, target))
    if real is not None:
        y_ND, target_ND = y_ND[real.to(y.device)], target_ND[real.to(y.device)]
    size_N = target_ND.square().sum(1)
    return ((y_ND - target_ND).square().sum(1) / size_N.clamp(min=1e-12)).mean()


def _held_out(batches: int, how: Reconstruct) -> int:
    if how.held_out == 0 or batches < 2:
        return 0
    return max(1, round(how.held_out * batches))
