"""Fashion-MNIST by a small convolutional network, and by a small vision transformer.

Shape suffixes: N images, C channels, H and W pixels, T patches, D width, A heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..images import fashion_mnist
from .task import Batch, Task, lot, named_right

IMAGES, PATCH = 60000, 7


def clothes_cnn() -> Task:
    """Two convolutions and two linear layers, 106,000 weights; minutes on two cores."""
    return _task("clothes-cnn", "Fashion-MNIST, convolutional network", lambda: Net(16), steps=2340, rate=2e-3)


def clothes_vit() -> Task:
    """Four transformer blocks of width 96 on 16 patches, 450,000 weights."""
    return _task("clothes-vit", "Fashion-MNIST, vision transformer", Transformer, steps=2340, rate=1e-3)


def _task(name: str, title: str, build: Callable[[], nn.Module], *, steps: int, rate: float) -> Task:
    return Task(
        name=name,
        title=title,
        build=build,
        batch=lambda step, size, seed: _part(lot(IMAGES, step, size, seed)),
        loss=functional.cross_entropy,
        measure=lambda model: {"accuracy": accuracy(model)},
        quality="accuracy",
        higher_is_better=True,
        steps=steps,
        size=128,
        rate=rate,
    )


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


class Block(nn.Module):
    """Attention and a two-layer network, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x_NTD)).unflatten(-1, (3, self.heads, -1))  # N T 3 A D/A
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed_NATD = functional.scaled_dot_product_attention(q, k, v)
        x_NTD = x_NTD + self.project(mixed_NATD.transpose(1, 2).flatten(2))
        return x_NTD + self.down(functional.gelu(self.up(self.norm2(x_NTD))))


class Transformer(nn.Module):
    """Patches of 7×7 pixels as tokens, learned places, the mean token classified."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.places_TD = nn.Parameter(0.02 * torch.randn((28 // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NTD = self.embed(x_NCHW).flatten(2).transpose(1, 2) + self.places_TD
        return self.out(self.norm(self.blocks(x_NTD)).mean(1))


@lru_cache
def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [60000, 1, 28, 28] and labels, test images [10000, 1, 28, 28] and labels, standardised."""
    data = fashion_mnist()
    scale = lambda x: (x.float().unsqueeze(1) / 255 - 0.286) / 0.353  # the set's mean and standard deviation
    return scale(data.train.images), data.train.labels, scale(data.test.images), data.test.labels


def _part(chosen: Tensor) -> Batch:
    x, y, _, _ = tensors()
    return x[chosen], y[chosen]


def accuracy(model: nn.Module) -> float:
    """Share of the 10,000 test images named correctly."""
    _, _, x, y = tensors()
    return named_right(model, x, y)
