"""Packaged time series.

Shapes: N series, T time steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import AssetError
from gossamer.data.store import fetch

CROP_CLASSES = 24


@dataclass(frozen=True)
class LabelledSeries:
    """Series as float32 [N, T] and their classes as int64 [N], from 0 on."""

    series: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SeriesSet:
    """A labelled set of time series, split as published."""

    train: LabelledSeries
    test: LabelledSeries


def read_ucr(path: Path) -> LabelledSeries:
    """Read a file of the UCR archive: a line per series, its class (from 1 on) and its values, parted by tabs.

    Raises:
        AssetError: a line is not made of numbers, lines differ in length, or a class is not a whole number above 0.
    """
    try:
        rows = np.loadtxt(path, delimiter="\t", ndmin=2)
    except ValueError as error:
        raise AssetError(
            f"{path.name} is no table of numbers ({error}); remove the asset and fetch it again"
        ) from error
    classes = rows[:, 0]
    if rows.shape[1] < 2 or (classes < 1).any() or (classes % 1).any():
        raise AssetError(f"{path.name} does not begin its lines with a class from 1 on; it is no file of the archive")
    return LabelledSeries(torch.from_numpy(rows[:, 1:]).float(), torch.from_numpy(classes).long() - 1)


def ucr_crop() -> SeriesSet:
    """Crop of the UCR archive: how green a place was at 46 times, seen by satellite, and which of 24 uses it was in.

    7,200 series to train on and 16,800 to test on, as published; values lie about 0.5 and are not standardised.

    Raises:
        AssetError: the asset cannot be had; see `fetch`.

    Reference: Dau et al., The UCR Time Series Archive, arXiv:1810.07758; Tan, Webb and Petitjean, SDM 2017.
    """
    folder = fetch("ucr-crop")
    return SeriesSet(train=read_ucr(folder / "train.tsv"), test=read_ucr(folder / "test.tsv"))
