"""Layers that are sparse by birth."""

from gossamer.nn.conv import PackedConv2d, is_pointwise
from gossamer.nn.linear import PackedLinear

__all__ = ["PackedConv2d", "PackedLinear", "is_pointwise"]
