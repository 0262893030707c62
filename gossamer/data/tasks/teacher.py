"""A network learns what another one, drawn at random, answers: seconds to train, and nothing to fetch.

Shape suffixes: N samples, F features.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from .task import Batch, Task, lot

TRAIN, TEST, FEATURES, CLASSES = 4096, 2048, 32, 8


def teacher() -> Task:
    """Name the class that a random two-layer network names; 4,096 training samples, 2,048 for the test."""
    return Task(
        name="teacher",
        title="A random network's answers, two hidden layers of 128",
        build=_build,
        batch=lambda step, size, seed: _part(lot(TRAIN, step, size, seed)),
        loss=functional.cross_entropy,
        measure=_measure,
        quality="accuracy",
        higher_is_better=True,
        steps=400,
        size=64,
        rate=3e-3,
    )


def _build() -> nn.Module:
    hidden = [nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, CLASSES))


@lru_cache
def _samples() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    x_NF = torch.randn(TRAIN + TEST, FEATURES, generator=draw)
    inner = torch.randn(FEATURES, 16, generator=draw)
    outer = torch.randn(16, CLASSES, generator=draw)
    return x_NF, ((x_NF @ inner).relu() @ outer).argmax(1)


def _part(chosen: Tensor) -> Batch:
    x_NF, y_N = _samples()
    return x_NF[chosen], y_N[chosen]


@torch.no_grad()
def _measure(model: nn.Module) -> dict[str, float]:
    x_NF, y_N = _samples()
    right = model(x_NF[TRAIN:]).argmax(1) == y_N[TRAIN:]
    return {"accuracy": right.float().mean().item()}
