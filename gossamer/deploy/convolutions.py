"""Convolutions as packing measures them: whole layers on the images they were seen with.

Shapes: N images, C input and M output channels, H x W pixels, K = C / groups * kernel columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import DispatchError
from ..kernels.reference import activate
from ..nn.conv import PackedConv2d
from ..nn.shape import Convolution, Shape, lies_channels_last
from .candidates import TORCH_DENSE, Candidate
from .measure import Ready, memory_of


@dataclass(frozen=True)
class Images:
    """What a convolution was called with.

    Args:
        shape: [N, C, H, W], [N, C, L], [N, C, D, H, W], or any without N.
        channels_last: channels of a pixel lie side by side in memory.
    """

    shape: tuple[int, ...]
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> Images:
        return cls(tuple(x.shape), lies_channels_last(x))

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + (" channels last" if self.channels_last else "")

    def drawn(self, like: Tensor) -> Tensor:
        """Random images of this kind, with a weight's dtype and device."""
        generator = torch.Generator().manual_seed(len(self.shape))
        x = torch.randn(self.shape, generator=generator).to(like.dtype).to(like.device)
        return x.to(memory_format=torch.channels_last) if self.channels_last else x


@dataclass(frozen=True)
class Convolved:
    """What a layer computes, act(conv(x) + b), and on which images.

    Every way is timed as a call of the whole layer, from images in the memory layout they came in to images in the
    layout that torch's own layer gives, so that no layer around it pays for the choice.

    Args:
        conv: the dense layer.
        activation: applied to the result.
        inputs: one entry per call.
    """

    conv: Convolution
    activation: str
    inputs: tuple[Images, ...]
    dense: ClassVar[tuple[Candidate, ...]] = (TORCH_DENSE,)
    oracle: ClassVar[str] = "torch's convolution"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.conv.weight.device

    @property
    def tokens(self) -> tuple[int, ...]:
        """Output pixels of each call."""
        return tuple(pixels(self.conv, images.shape) for images in self.inputs)

    def calls(self) -> list[tuple[Tensor, int]]:
        """Each distinct input, and how often it comes."""
        return [(i.drawn(self.conv.weight), self.inputs.count(i)) for i in dict.fromkeys(self.inputs)]

    def want(self, x: Tensor) -> Tensor:
        """The result, by torch."""
        return activate(self.conv(x), self.activation)

    def ready(self, candidate: Candidate) -> Ready:
        """Prepare a candidate."""
        weight = self.conv.weight
        if candidate == TORCH_DENSE:
            return Ready(self.want, weight.numel() * weight.element_size())
        packed = self.packed(candidate)
        memory = memory_of(packed.linear.plan)  # a backend that cannot serve says so here
        if (refused := packed.refuse()) is not None:
            raise DispatchError(refused)
        return Ready(packed, memory)

    def packed(self, candidate: Candidate) -> PackedConv2d:
        """The layer as this candidate stores it."""
        how = {"backend": candidate.backend, "activation": self.activation}
        return PackedConv2d.from_conv(self.conv, candidate.build, **how)

    def few(self, x: Tensor) -> None:
        """Images are larger than what a convolution reads from memory, so nothing is measured cold."""


def pixels(conv: Convolution, shape: tuple[int, ...]) -> int:
    """Output pixels, of all images together."""
    axes = conv.weight.dim() - 2
    return math.prod(Shape.of(conv).output(shape[-axes:])) * (shape[0] if len(shape) == axes + 2 else 1)


def kind_of(conv: Convolution, inputs: tuple[Images, ...]) -> str:
    """The layer and its images in words, such as "conv 3x3 /2 on 1x32x112x112"."""
    shape = Shape.of(conv)
    options = shape.options()
    words = "conv " + "x".join(map(str, options["kernel_size"]))
    for sign, sizes in ((" /", options["stride"]), (" dilated ", options["dilation"])):
        words += "" if set(sizes) == {1} else sign + "x".join(dict.fromkeys(map(str, sizes)))
    words += f" in {shape.groups} groups" if shape.groups > 1 else ""
    words += " of channels last" if shape.channels_last else ""
    return f"{words} on {' + '.join(dict.fromkeys(map(str, inputs)))}"
