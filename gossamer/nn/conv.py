"""PackedConv2d: a 1x1 convolution whose weight is stored and multiplied in a sparse format.

Shapes: N images, K input and M output channels, H x W pixels.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from gossamer.core.errors import FormatError
from gossamer.nn.linear import FormatLike, PackedLinear


class PackedConv2d(nn.Module):
    """y[n, :, p] = act(W x[n, :, p] + b) at every pixel p, with W stored as a format.

    Sparse kernels read images in their own layout [N, K, H W]; other kernels see pixels as tokens.

    Args:
        linear: the product at one pixel; build the layer with `from_conv`.

    Example:
        >>> from gossamer.formats import CSR
        >>> layer = PackedConv2d.from_conv(nn.Conv2d(4, 3, 1), CSR)
        >>> layer(torch.zeros(2, 4, 5, 5)).shape
        torch.Size([2, 3, 5, 5])
    """

    def __init__(self, linear: PackedLinear) -> None:
        super().__init__()
        self.linear = linear

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        fmt: FormatLike,
        *,
        backend: str | None = None,
        activation: str = "none",
        support_mask: Tensor | None = None,
    ) -> Self:
        """Pack a convolution that mixes channels only.

        Args:
            conv: kernel 1x1, stride 1, no padding, one group; it is not changed.
            fmt: as in `PackedLinear.from_linear`.
            backend: insist on a backend by name.
            activation: fused after the product.
            support_mask: bool, in the shape of the weight.

        Raises:
            FormatError: another kind of convolution; leave it dense.
        """
        if not is_pointwise(conv):
            raise FormatError(f"PackedConv2d packs 1x1 convolutions of stride 1 and one group, got {conv}")
        weight = conv.weight.flatten(1)
        mask = None if support_mask is None else support_mask.flatten(1)
        linear = PackedLinear.from_linear(weight, fmt, backend=backend, activation=activation, support_mask=mask)
        if conv.bias is not None:
            linear.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
        return cls(linear).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        linear = self.linear
        if x.dim() not in (3, 4) or x.shape[-3] != linear.in_features:
            want = f"[N, {linear.in_features}, H, W]"
            raise FormatError(f"the layer takes images {want} or without N, got shape {tuple(x.shape)}")
        product = None if linear.as_operator(x) else getattr(linear.plan.runner, "run_columns", None)
        if product is None or x.dtype is not torch.float32:
            return linear(x.movedim(-3, -1)).movedim(-1, -3)
        y = product(x.flatten(-2).contiguous(), linear.bias, linear.activation)
        return y.view(*x.shape[:-3], linear.out_features, *x.shape[-2:])

    def unpack(self) -> nn.Conv2d:
        """The dense convolution this was packed from, bit for bit. Raises FormatError when an activation is fused."""
        dense = self.linear.unpack()
        conv = nn.Conv2d(dense.in_features, dense.out_features, 1, bias=False, device="meta")
        conv.weight = nn.Parameter(dense.weight.detach()[:, :, None, None])
        conv.bias = dense.bias
        return conv.train(self.training)


def is_pointwise(conv: nn.Module) -> bool:
    """Whether a module is a convolution that mixes channels at one pixel: 1x1, stride 1, unpadded, ungrouped."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid", "same")
    )
