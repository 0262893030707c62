"""What the training claims share: a small convolutional network on Fashion-MNIST.

Shape suffixes: N images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.attach import Handle
from gossamer.data.images import fashion_mnist


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


class Net(nn.Module):
    """Two convolutions and two linear layers, all proportional to `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.hidden = nn.Linear(2 * width * 49, 4 * width)
        self.out = nn.Linear(4 * width, 10)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NCHW = functional.max_pool2d(self.conv1(x_NCHW).relu(), 2)
        x_NCHW = functional.max_pool2d(self.conv2(x_NCHW).relu(), 2)
        return self.out(self.hidden(x_NCHW.flatten(1)).relu())


def weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights (biases are left out, and left dense)."""
    return {n.removesuffix(".weight"): tuple(p.shape) for n, p in model.named_parameters() if p.ndim > 1}


@lru_cache
def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, images and labels to test on."""
    data = fashion_mnist()
    scale = lambda x: (x.float().unsqueeze(1) / 255 - 0.286) / 0.353  # the set's mean and standard deviation
    return scale(data.train.images), data.train.labels, scale(data.test.images), data.test.labels


Sparse = Callable[[nn.Module, torch.optim.Optimizer], list[Handle]]


def train(width: int, effort: Effort, *, seed: int, sparse: Sparse | None = None) -> tuple[Net, float]:
    """Train a network; `sparse` attaches handles before the first step. Returns it and its test accuracy."""
    torch.manual_seed(seed)
    model = Net(width)
    optimizer = torch.optim.Adam(model.parameters(), effort.rate)
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
    return model, accuracy(model)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the 10,000 test images named correctly."""
    _, _, x, y = tensors()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000)))
    return right / len(y)
