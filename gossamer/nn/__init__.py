"""Layers that are sparse by birth."""

from gossamer.nn.conv import PackedConv2d
from gossamer.nn.linear import PackedLinear
from gossamer.nn.sparse_linear import Move, SparseLinear, carry

__all__ = ["Move", "PackedConv2d", "PackedLinear", "SparseLinear", "carry"]
