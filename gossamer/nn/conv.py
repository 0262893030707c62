"""PackedConv2d: a convolution whose weight is stored and multiplied in a sparse format.

Shapes: N images, C input and M output channels, D x H x W pixels.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d, pad

from gossamer.core.errors import DispatchError, FormatError
from gossamer.kernels.cpu.window import Window
from gossamer.kernels.reference import activate
from gossamer.nn.linear import FormatLike, PackedLinear
from gossamer.nn.shape import Convolution, Shape, lies_channels_last

# Backends that leave a convolution to torch, on the unpacked weight; with None torch is the last resort.
_TORCH = (None, "unpack", "dense", "reference")


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


def _channels_last(x: Tensor) -> Tensor:
    return x if lies_channels_last(x) else x.to(memory_format=torch.channels_last)
