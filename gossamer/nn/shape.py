"""What a convolution is besides its weight: the window it slides, and how it is written down.

Shapes: C input channels, D x H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.window import Depth, Window, same_padding

Convolution = nn.Conv2d | nn.Conv1d | nn.Conv3d
_FLAT = Depth()
_AXES: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True)
class Shape:
    """What a convolution is besides its weight.

    Args:
        kind: `nn.Conv2d`, `nn.Conv1d` or `nn.Conv3d`.
        channels: C, of all groups together.
        window: kernel, stride, padding and dilation; of one line for `nn.Conv1d`, of one slice for `nn.Conv3d`.
        groups: as in torch.
        padding: as the dense layer was given it.
        channels_last: the dense weight lies so in memory, and torch then gives its results so, too.
        depth: the window's third axis, of `nn.Conv3d`.
    """

    kind: type[Convolution]
    channels: int
    window: Window
    groups: int
    padding: Any
    channels_last: bool = False
    depth: Depth = _FLAT

    @classmethod
    def of(cls, conv: nn.Module) -> Self:
        """What a convolution is besides its weight. Raises FormatError for what cannot be packed."""
        kind = next((kind for kind in _AXES if isinstance(conv, kind)), None)
        if kind is None:
            raise FormatError(f"PackedConv2d packs nn.Conv1d to nn.Conv3d, got {type(conv).__name__}; leave it dense")
        if conv.padding_mode != "zeros":
            raise FormatError(f"PackedConv2d pads with zeros, the layer pads with {conv.padding_mode}; leave it dense")
        (deep, *kernel), (far, *stride), (apart, *dilation) = (
            _three(sizes, 1) for sizes in (conv.kernel_size, conv.stride, conv.dilation)
        )
        (front, back), *sides = _padding(conv)
        window = Window(tuple(kernel), tuple(stride), tuple(s[i] for i in (0, 1) for s in sides), tuple(dilation))
        last = kind is nn.Conv2d and lies_channels_last(conv.weight)
        depth = Depth(deep, far, front, back, apart)
        return cls(kind, conv.in_channels, window, conv.groups, conv.padding, last, depth)

    @property
    def axes(self) -> int:
        """Axes of pixels: 1, 2 or 3."""
        return _AXES[self.kind]

    @property
    def taps(self) -> int:
        """Weights of one kernel."""
        return self.depth.kernel * self.window.taps

    @property
    def columns(self) -> int:
        """Weights of one output channel."""
        return self.channels // self.groups * self.taps

    @property
    def pointwise(self) -> bool:
        """Whether it mixes channels at one pixel only."""
        return self.window == Window((1, 1)) and self.depth == _FLAT and self.groups == 1

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the dense layer."""
        window, depth, axes = self.window, self.depth, self.axes
        sizes = {
            "kernel_size": (depth.kernel, *window.kernel),
            "stride": (depth.stride, *window.stride),
            "dilation": (depth.dilation, *window.dilation),
        }
        return {key: value[-axes:] for key, value in sizes.items()} | {"padding": self.padding, "groups": self.groups}

    def output(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels of the result along each axis. Raises FormatError when the window does not fit into the image."""
        deep, high, wide = _three(size, 1)
        return (self.depth.output(deep), *self.window.output(high, wide))[-self.axes :]

    def record(self) -> dict[str, Any]:
        """The same as JSON holds it: what a file says of a packed convolution."""
        sizes = {key: list(v) if isinstance(v, tuple) else v for key, v in self.options().items()}
        return {"kind": self.kind.__name__, "channels": self.channels, "channels_last": self.channels_last, **sizes}


def lies_channels_last(x: Tensor) -> bool:
    """Whether torch takes images for channels last: by strides alone, which decide for one pixel or channel, too."""
    if x.dim() != 4 or not x.numel() or not x.stride(1):
        return False
    least = 0
    for axis in (1, 3, 2):
        if x.stride(axis) < least:
            return False
        least = x.stride(axis) * x.shape[axis]
    return x.stride(0) >= least and least != x.stride(1)


def _three(sizes: tuple[int, ...], missing: int) -> tuple[int, int, int]:
    """Sizes along depth, height and width; a line has the last one only."""
    return (*(missing,) * (3 - len(sizes)), *sizes)  # type: ignore[return-value]


def _padding(conv: Convolution) -> tuple[tuple[int, int], ...]:
    """Zeros before and behind along depth, height and width; torch's "same" puts an odd one behind."""
    if conv.padding == "valid":
        return ((0, 0),) * 3
    if conv.padding != "same":
        return tuple((n, n) for n in _three(conv.padding, 0))
    kernel, dilation = _three(conv.kernel_size, 1), _three(conv.dilation, 1)
    sides = (same_padding((1, k), (1, 1), (1, d), 1, 1) for k, d in zip(kernel, dilation))
    return tuple((left, right) for _, left, _, right in sides)
