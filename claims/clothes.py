"""What the training claims share: the small convolutional network on Fashion-MNIST, at any width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from gossamer.attach import Handle
from gossamer.data.tasks.clothes import Net, accuracy, tensors


@dataclass(frozen=True)
class Effort:
    """How long to train. images: training images used; batch: per step; rate: of Adam, cosine to 0."""

    images: int
    epochs: int
    batch: int = 128
    rate: float = 2e-3

    @property
    def steps(self) -> int:
        return self.epochs * (self.images // self.batch)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """What trains the model."""
        return torch.optim.Adam(model.parameters(), self.rate)


def weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights (biases are left out, and left dense)."""
    return {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.named_parameters() if p.ndim > 1}


Sparse = Callable[[nn.Module, torch.optim.Optimizer], list[Handle]]


Build = Callable[[int], nn.Module]


def train(
    width: int, effort: Effort, *, seed: int, sparse: Sparse | None = None, build: Build = Net
) -> tuple[nn.Module, float]:
    """Train a network; `sparse` attaches handles before the first step. Returns it and its test accuracy."""
    torch.manual_seed(seed)
    model = build(width)
    optimizer = effort.optimizer(model)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, effort.steps)
    handles = sparse(model, optimizer) if sparse else []
    x, y, _, _ = tensors()
    for _ in range(effort.epochs):
        for part in torch.randperm(effort.images)[: effort.steps // effort.epochs * effort.batch].split(effort.batch):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            decay.step()
            for handle in handles:
                handle.step()
    for handle in handles:
        handle.remove()
    return model, accuracy(model.eval())
