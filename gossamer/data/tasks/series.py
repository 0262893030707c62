"""A UCR set of time series by a small convolutional network.

Shape suffixes: N series, T time steps, C channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..series import CROP_CLASSES, ucr_crop
from .task import Batch, Task, lot, named_right

SERIES = 7200


def ucr_cnn() -> Task:
    """Three convolutions over time, each with batch norm, and the mean over time classified; 67,000 weights."""
    return Task(
        name="ucr-cnn",
        title="UCR Crop, convolutional network over time",
        build=TimeNet,
        batch=lambda step, size, seed: _part(lot(SERIES, step, size, seed)),
        loss=functional.cross_entropy,
        measure=lambda model: {"accuracy": accuracy(model)},
        quality="accuracy",
        higher_is_better=True,
        steps=2250,
        size=64,
        rate=2e-3,
    )


class TimeNet(nn.Module):
    """The fully convolutional network of arXiv:1611.06455, half as wide: kernels of 7, 5 and 3 steps.

    Departs from: the paper's first kernel has 8 steps, which no symmetric padding keeps in place.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(1, width, 7, padding=3), nn.BatchNorm1d(width)
        self.conv2, self.norm2 = nn.Conv1d(width, 2 * width, 5, padding=2), nn.BatchNorm1d(2 * width)
        self.conv3, self.norm3 = nn.Conv1d(2 * width, width, 3, padding=1), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, CROP_CLASSES)

    def forward(self, x_NT: Tensor) -> Tensor:
        x_NCT = self.norm1(self.conv1(x_NT.unsqueeze(1))).relu()
        x_NCT = self.norm2(self.conv2(x_NCT)).relu()
        return self.out(self.norm3(self.conv3(x_NCT)).relu().mean(2))


@lru_cache
def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training series [7200, 46] and classes, test series [16800, 46] and classes, standardised by the training set."""
    data = ucr_crop()
    std, mean = torch.std_mean(data.train.series)
    scale = lambda x: (x - mean) / std
    return scale(data.train.series), data.train.labels, scale(data.test.series), data.test.labels


def _part(chosen: Tensor) -> Batch:
    x, y, _, _ = tensors()
    return x[chosen], y[chosen]


def accuracy(model: nn.Module) -> float:
    """Share of the 16,800 test series named correctly."""
    _, _, x, y = tensors()
    return named_right(model, x, y)
