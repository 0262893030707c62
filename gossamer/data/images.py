"""Packaged image sets as uint8 tensors.

Shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gossamer.core.errors import AssetError, need
from gossamer.data.store import fetch

IDX_UINT8 = 0x08
# The customary ImageNet evaluation: resize to 256, keep the central 224.
RESIZE_OVER_CROP = 256 / 224
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class LabelledImages:
    """Images as uint8 (`[N, H, W]` grey or `[N, 3, H, W]` RGB), int64 labels `[N]`, and class names.

    `names` is empty where the package gives only numbers (the 1,000 ImageNet classes).
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSet:
    """A labelled image set, split as published."""

    train: LabelledImages
    test: LabelledImages


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of bytes (LeCun's MNIST format), gzipped or not.

    Layout: two zero bytes, the type (0x08 = uint8), the number of axes, each axis as a big-endian 32-bit
    integer, then the bytes.

    Raises:
        AssetError: the header is another type, or the length disagrees with it.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if raw[:3] != bytes((0, 0, IDX_UINT8)) or len(raw) != 4 + 4 * axes + math.prod(shape):
        raise AssetError(f"{path.name} is not an IDX file of bytes; remove the asset and fetch it again")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * axes).reshape(shape)


def _idx_set(folder: Path, *, suffix: str, names: tuple[str, ...]) -> ImageSet:
    def part(prefix: str) -> LabelledImages:
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}")
        return LabelledImages(images, labels.long(), names)

    return ImageSet(train=part("train"), test=part("t10k"))


def fashion_mnist() -> ImageSet:
    """Fashion-MNIST: 60,000 and 10,000 grey 28x28 pictures of clothes in 10 classes.

    Raises:
        AssetError: the asset cannot be had; it is a Debian package, so elsewhere it is supplied by hand.
    """
    return _idx_set(fetch("fashion-mnist"), suffix=".gz", names=CLOTHES)


def mnist() -> ImageSet:
    """MNIST: 60,000 and 10,000 grey 28x28 pictures of digits.

    Raises:
        AssetError: the asset cannot be had; see `fetch`.
    """
    return _idx_set(fetch("mnist"), suffix="", names=DIGITS)


def _rgb(path: Path, size: int) -> Tensor:
    pillow = need("PIL.Image", "report")
    side = round(size * RESIZE_OVER_CROP)
    image = pillow.open(path).convert("RGB").resize((side, side), pillow.Resampling.BICUBIC)
    start = (side - size) // 2
    pixels = image.crop((start, start, start + size, start + size)).tobytes()
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(size, size, 3).permute(2, 0, 1)


def foolbox_images(size: int = 224) -> LabelledImages:
    """Twenty labelled ImageNet pictures: a smoke test for ImageNet models.

    One picture is worth 5 points, so this is no accuracy figure; to judge a pruned model compare its
    answers with the dense model's instead.

    Args:
        size: pixels per side of the central crop, after a bicubic resize of the square originals to
            256/224 of it.

    Raises:
        AssetError: the asset cannot be had; see `fetch`.
        MissingDependency: Pillow is not installed (it comes with the extra `report`).
    """
    paths = sorted(fetch("foolbox-images").glob("imagenet_*.jpg"))
    labels = torch.tensor([int(path.stem.rsplit("_", 1)[1]) for path in paths])
    return LabelledImages(torch.stack([_rgb(path, size) for path in paths]), labels, ())
