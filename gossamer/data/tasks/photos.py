"""Photographs at twice their size: a small EDSR on ImageNet pictures that were halved by a bicubic filter.

Shape suffixes: N images or patches, C channels, H and W pixels (of the small picture in inputs, of the large one else).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..images import foolbox_images
from .task import Batch, Task, lot

TRAINED, SIDE, PATCH, PLACES = 15, 224, 24, 512  # pictures to train on of twenty; pixels; patches of each picture
BORDER = 2  # pixels at each edge that do not count, as is usual at this scale
LUMA = (65.481, 128.553, 24.966)  # of ITU-R BT.601, for colours from 0 to 1


def photos_edsr() -> Task:
    """Three residual blocks of width 24, 40,000 weights; 15 pictures to train on, PSNR on 5 others.

    A patch is one of 512 places of a picture, turned or mirrored by its place; the picture that a network sees is the
    large one halved by a bicubic filter, as in super-resolution benchmarks.
    """
    return Task(
        name="photos-edsr",
        title="Photographs at twice their size, small EDSR",
        build=Edsr,
        batch=_batch,
        loss=functional.l1_loss,
        measure=lambda model: {"PSNR": psnr(model)},
        quality="PSNR",
        higher_is_better=True,
        steps=2000,
        size=8,
        rate=1e-3,
    )


class Edsr(nn.Module):
    """Residual blocks without batch norms, then pixels shuffled to twice the size; they add to a bicubic picture."""

    def __init__(self, width: int = 24, blocks: int = 3) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.head(x_NCHW - 0.5)
        y_NCHW = y_NCHW + self.body(self.blocks(y_NCHW))
        return doubled(x_NCHW) + functional.pixel_shuffle(self.up(y_NCHW), 2)


class Block(nn.Module):
    """Two convolutions beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.conv2(self.conv1(x_NCHW).relu())


def doubled(x_NCHW: Tensor) -> Tensor:
    """Twice as large, by bicubic interpolation: what a network has to beat."""
    return functional.interpolate(x_NCHW, scale_factor=2, mode="bicubic")


@torch.no_grad()
def psnr(model: nn.Module) -> float:
    """Peak signal-to-noise ratio of luma, in dB, the mean over the five pictures that are not trained on."""
    small, large = (x[TRAINED:] for x in pictures())
    made = model(small).clamp(0, 1)
    return sum(_psnr(a, b) for a, b in zip(made, large)) / len(large)


def _psnr(a_CHW: Tensor, b_CHW: Tensor) -> float:
    apart_CHW = ((a_CHW - b_CHW) * torch.tensor(LUMA)[:, None, None])[:, BORDER:-BORDER, BORDER:-BORDER]
    return 10 * math.log10(255**2 / float(apart_CHW.sum(0).square().mean()))


@lru_cache
def pictures() -> tuple[Tensor, Tensor]:
    """All twenty, colours from 0 to 1: halved [20, 3, 112, 112], to steps of 1/255 as a file would, and whole."""
    whole = foolbox_images(SIDE).images.float() / 255
    half = functional.interpolate(whole, scale_factor=0.5, mode="bicubic", antialias=True)
    return (half.clamp(0, 1) * 255).round() / 255, whole


def _batch(step: int, size: int, seed: int) -> Batch:
    parts = [_patch(int(n)) for n in lot(TRAINED * PLACES, step, size, seed)]
    return torch.stack([a for a, _ in parts]), torch.stack([b for _, b in parts])


def _patch(number: int) -> tuple[Tensor, Tensor]:
    picture, place = divmod(number, PLACES)
    x, y = _corners()[place].tolist()
    small, large = (p[picture] for p in pictures())
    cut = (small[:, y : y + PATCH, x : x + PATCH], large[:, 2 * y : 2 * (y + PATCH), 2 * x : 2 * (x + PATCH)])
    return tuple(_turned(p, place % 8) for p in cut)  # type: ignore[return-value]


def _turned(p_CHW: Tensor, way: int) -> Tensor:
    """One of the eight symmetries of a square."""
    return (p_CHW.flip(2) if way >= 4 else p_CHW).rot90(way % 4, (1, 2))


@lru_cache
def _corners() -> Tensor:
    """Left and upper edges of the patches of each small picture, [512, 2]."""
    return torch.randint(SIDE // 2 - PATCH + 1, (PLACES, 2), generator=torch.Generator().manual_seed(11))
