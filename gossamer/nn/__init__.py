"""Layers that are sparse by birth."""

from gossamer.nn.linear import PackedLinear

__all__ = ["PackedLinear"]
