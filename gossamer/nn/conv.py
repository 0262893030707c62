"""PackedConv2d: a convolution whose weight is stored and multiplied in a sparse format.

Shapes: N images, C input and M output channels, D x H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d, pad

from gossamer.core.errors import DispatchError, FormatError
from gossamer.kernels.cpu.window import Depth, Window, same_padding
from gossamer.kernels.reference import activate
from gossamer.nn.linear import FormatLike, PackedLinear

Convolution = nn.Conv2d | nn.Conv1d | nn.Conv3d
_FLAT = Depth()
_AXES: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
# Backends that leave a convolution to torch, on the unpacked weight; with None torch is the last resort.
_TORCH = (None, "unpack", "dense", "reference")


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


class PackedConv2d(nn.Module):
    """y = act(conv(x, W) + b) on images [N, C, H, W], lines [N, C, L] or volumes, with W stored as a format.

    Plain inference in float32 on a CPU runs sparse kernels without im2col. Elsewhere, inside autocast, and where
    gradients are wanted, the weight is unpacked and convolved densely by torch; gradients reach x, the bias and the
    kept values.

    Args:
        linear: holds the flattened weight [M, C / groups * kernel]; build the layer with `from_conv`.
        shape: the convolution; 1x1 where None.

    Raises:
        DispatchError: at a call, when a backend was named that cannot run this convolution; the message says why.

    Example:
        >>> from gossamer.formats import CSR
        >>> layer = PackedConv2d.from_conv(nn.Conv2d(4, 3, 3, padding=1), CSR)
        >>> layer(torch.zeros(2, 4, 5, 5)).shape
        torch.Size([2, 3, 5, 5])
    """

    def __init__(self, linear: PackedLinear, shape: Shape | None = None) -> None:
        super().__init__()
        self.linear = linear
        self.shape = shape = shape or Shape(nn.Conv2d, linear.in_features, Window((1, 1)), 1, (0, 0))
        # Models read these of the layer they were written with.
        self.in_channels, self.out_channels = shape.channels, linear.out_features
        for name, value in shape.options().items():
            setattr(self, name, value)

    @classmethod
    def from_conv(
        cls,
        conv: Convolution,
        fmt: FormatLike,
        *,
        backend: str | None = None,
        activation: str = "none",
        support_mask: Tensor | None = None,
    ) -> Self:
        """Pack a convolution.

        Args:
            conv: `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with any stride, zero padding, dilation and groups; it is not
                changed.
            fmt: as in `PackedLinear.from_linear`; it stores the weight flattened to [M, C / groups * kernel].
            backend: insist on a backend by name.
            activation: fused after the product.
            support_mask: bool, in the shape of the weight.

        Raises:
            FormatError: another kind of layer, or padding with anything but zeros; leave it dense.
        """
        shape, weight = Shape.of(conv), conv.weight.flatten(1)
        mask = None if support_mask is None else support_mask.flatten(1)
        linear = PackedLinear.from_linear(weight, fmt, backend=backend, activation=activation, support_mask=mask)
        if conv.bias is not None:
            linear.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
        return cls(linear, shape).train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight [M, C / groups, ...], unpacked afresh at every look."""
        return self.linear.weight.unflatten(1, (-1, *self.shape.options()["kernel_size"]))

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias [M], or None."""
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        last = self.shape.axes == 2 and lies_channels_last(x)
        y = self._pixels(x, last) if self.shape.pointwise else self._windows(x)
        # Torch hands on the layout it was given, and so no layer after this one has to turn it.
        return _channels_last(y) if y.dim() == 4 and self.shape.axes == 2 and (last or self._turns) else y

    @property
    def _turns(self) -> bool:
        return self.shape.channels_last and self.shape.axes == 2

    def _check(self, x: Tensor) -> None:
        axes, channels = self.shape.axes, self.shape.channels
        if x.dim() not in (axes + 1, axes + 2) or x.shape[-axes - 1] != channels:
            want = ("lines [N, {}, L]", "images [N, {}, H, W]", "volumes [N, {}, D, H, W]")[axes - 1].format(channels)
            raise FormatError(f"the layer takes {want} or without N, got shape {tuple(x.shape)}")
        dtype = self.linear.values.dtype
        if x.layout is not torch.strided or (x.dtype != dtype and not torch.is_autocast_enabled(x.device.type)):
            raise FormatError(f"the layer's weights are {dtype}, x is {x.dtype} in the layout {x.layout}; convert one")
        if not torch.compiler.is_compiling():
            self.shape.output(tuple(x.shape[-axes:]))

    def _pixels(self, x: Tensor, last: bool) -> Tensor:
        """A 1x1 convolution: sparse kernels read images in their own layout, others see pixels as tokens."""
        linear, axes = self.linear, self.shape.axes
        product = None if linear.as_operator(x) else getattr(linear.current_plan().runner, "run_columns", None)
        if product is None or last or x.dtype is not torch.float32:
            return linear(x.movedim(-axes - 1, -1)).movedim(-1, -axes - 1)
        y = product(x.flatten(-axes).contiguous(), linear.bias, linear.activation)
        return y.view(*x.shape[: -axes - 1], linear.out_features, *x.shape[-axes:])

    def _windows(self, x: Tensor) -> Tensor:
        lines = x.unsqueeze(-2) if self.shape.axes == 1 else x
        y = self._sparse(lines)
        y = self._dense(lines) if y is None else y
        return y.squeeze(-2) if self.shape.axes == 1 else y

    def refuse(self) -> str | None:
        """Why plain inference in float32 on the CPU could not run this layer sparse; None when it can."""
        if self.shape.pointwise:
            return None
        plan = self.linear.current_plan()
        weights = getattr(plan.runner, "ordered", None)
        if weights is None:
            return f"{plan.kernel} has no convolution beyond 1x1, only float32 streams of row groups have"
        from gossamer.kernels.cpu.conv import refuse_conv

        return refuse_conv(weights, self.shape.window, self.shape.groups)

    def _sparse(self, x: Tensor) -> Tensor | None:
        """The convolution by the sparse kernels; None where torch is to compute it.

        Raises:
            DispatchError: the layer's backend was named, and cannot run this convolution.
        """
        linear, shape = self.linear, self.shape
        if linear.as_operator(x):
            return None
        if (refused := self.refuse()) is not None:
            if linear.backend not in _TORCH:
                raise DispatchError(
                    f"backend {linear.backend!r} cannot run this convolution: {refused}; leave backend=None"
                )
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        from gossamer.kernels.cpu.conv import sparse_conv
        from gossamer.kernels.cpu.conv3d import sparse_conv3d

        weights, x = linear.current_plan().runner.ordered, x.contiguous()
        how = linear.bias, linear.activation
        if shape.axes == 3:
            return sparse_conv3d(weights, x, shape.window, shape.depth, *how, groups=shape.groups)
        return sparse_conv(weights, x, shape.window, *how, groups=shape.groups)

    def _dense(self, x: Tensor) -> Tensor:
        """The same by torch, from the unpacked weight."""
        linear, window, depth = self.linear, self.shape.window, self.shape.depth
        top, left, bottom, right = window.padding
        if self.shape.axes == 3:
            x = pad(x, (left, right, top, bottom, depth.front, depth.back))
            steps, apart = (depth.stride, *window.stride), (depth.dilation, *window.dilation)
            y = conv3d(x, self.weight, linear.bias, steps, 0, apart, self.shape.groups)
            return activate(y, linear.activation)
        weight = linear.weight.unflatten(1, (-1, *window.kernel))
        if (top, left) != (bottom, right):
            x, top, left = pad(x, (left, right, top, bottom)), 0, 0
        y = conv2d(x, weight, linear.bias, window.stride, (top, left), window.dilation, self.shape.groups)
        return activate(y, linear.activation)

    def unpack(self) -> Convolution:
        """The dense convolution this was packed from, bit for bit. Raises FormatError when an activation is fused."""
        dense, shape = self.linear.unpack(), self.shape
        conv = shape.kind(shape.channels, dense.out_features, bias=False, device="meta", **shape.options())
        weight = dense.weight.detach().view(conv.weight.shape)
        conv.weight = nn.Parameter(_channels_last(weight) if self._turns else weight)
        conv.bias = dense.bias
        return conv.train(self.training)

    def extra_repr(self) -> str:
        named = ", ".join(f"{key}={value}" for key, value in self.shape.options().items())
        return f"{self.shape.channels}, {self.linear.out_features}, {named}"


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


def _channels_last(x: Tensor) -> Tensor:
    return x if lies_channels_last(x) else x.to(memory_format=torch.channels_last)


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
