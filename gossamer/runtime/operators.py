"""The runtime's own operators: each stands in a graph for several of torch's, and can compute itself in plain torch.

What they compute is defined by their `__call__`; how they run in panels is `tokens.py` and `planes.py`.

Shapes: B sequences, S positions, K inputs, M outputs, N images, C channels, H and W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.reference import ACTIVATIONS


class Operator:
    """An operator of the runtime, usable as the target of a graph node."""

    @property
    def __name__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads: sizes as in `torch.nn.functional.conv2d`; padding is top, left, bottom, right."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether it mixes channels at one pixel only."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding) and self.groups == 1


@dataclass(frozen=True, eq=False)
class Product(Operator):
    """y = act(W x + b + residual): a linear layer, or a convolution where `geometry` says so.

    Args:
        weight: [M, K], or [M, C / groups, kh, kw].
        bias: [M] or None.
        activation: as the kernels name it.
        geometry: of a convolution; None for a linear layer.
        name: of the layer in the model.
    """

    weight: Tensor
    bias: Tensor | None
    name: str
    activation: str = "none"
    geometry: Geometry | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._product(x)
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)

    def _product(self, x: Tensor) -> Tensor:
        g = self.geometry
        if g is None:
            return functional.linear(x, self.weight, self.bias)
        top, left, bottom, right = g.padding
        if (top, left) != (bottom, right):
            x, top, left = functional.pad(x, (left, right, top, bottom)), 0, 0
        return functional.conv2d(x, self.weight, self.bias, g.stride, (top, left), g.dilation, g.groups)

    @property
    def matrix(self) -> Tensor:
        """The weight as [M, K]."""
        return self.weight.flatten(1)


@dataclass(frozen=True, eq=False)
class Norm(Operator):
    """Over features: (x - mean) / sqrt(var + eps) * gamma + beta, or x / rms(x) * gamma where `centred` is False."""

    gamma: Tensor
    beta: Tensor | None
    eps: float
    centred: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        if self.centred:
            return functional.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.eps)
        return functional.rms_norm(x, self.gamma.shape, self.gamma, self.eps)


@dataclass(frozen=True, eq=False)
class Attention(Operator):
    """softmax(Q Kᵀ * scale + mask) V over heads, on rows [B, S, heads * dim].

    q, k and v may be one tensor of which each takes `heads * dim` features from its own offset.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    causal: bool = False
    offsets: tuple[int, int, int] = (0, 0, 0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = zip((q, k, v), self.offsets, (self.heads, self.kv_heads, self.kv_heads))
        q, k, v = (self._heads(x, offset, heads) for x, offset, heads in parts)
        y = functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )
        return y.transpose(1, 2).flatten(2)

    def _heads(self, x_BSK: Tensor, offset: int, heads: int) -> Tensor:
        part = x_BSK[..., offset : offset + heads * self.dim]
        return part.unflatten(-1, (heads, self.dim)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Rotary(Operator):
    """Turn pairs of features, half a head apart, by their position's angle; on rows [B, S, heads * dim].

    cos and sin are [1, 1, S, dim]; the kernel takes those that are the same in both halves.
    """

    heads: int
    dim: int

    def __call__(self, x_BSK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x_BSK.unflatten(-1, (self.heads, self.dim))
        cos, sin = (t.reshape(-1, t.shape[-2], 1, self.dim) for t in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).flatten(2)


@dataclass(frozen=True, eq=False)
class Combine(Operator):
    """Elementwise: act(x), act(x + other) or act(x) * other.

    Args:
        form: "alone", "add" or "multiply".
        activation: as the kernels name it.
    """

    form: str
    activation: str = "none"

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.form == "multiply":
            return ACTIVATIONS[self.activation](x) * other
        return ACTIVATIONS[self.activation](x if other is None else x + other)


@dataclass(frozen=True, eq=False)
class Pool(Operator):
    """Under a window: the largest value ("max"), the mean with padding as zeros ("mean") or without ("mean_inside")."""

    kind: str
    geometry: Geometry

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        g, (top, left, _, _) = self.geometry, self.geometry.padding
        if self.kind == "max":
            return functional.max_pool2d(x_NCHW, g.kernel, g.stride, (top, left), g.dilation)
        return functional.avg_pool2d(x_NCHW, g.kernel, g.stride, (top, left), count_include_pad=self.kind == "mean")


@dataclass(frozen=True, eq=False)
class GlobalPool(Operator):
    """The mean of each channel over its pixels, [N, C] or, where `keep` is set, [N, C, 1, 1]."""

    keep: bool

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        return torch.mean(x_NCHW, dim=(2, 3), keepdim=self.keep)
