"""Layers that are sparse by birth, and what holds layers together."""

from gossamer.nn.branches import Sum
from gossamer.nn.conv import PackedConv2d
from gossamer.nn.gin import SparseGIN
from gossamer.nn.linear import PackedLinear
from gossamer.nn.sparse_linear import Move, SparseLinear, carry

__all__ = ["Move", "PackedConv2d", "PackedLinear", "SparseGIN", "SparseLinear", "Sum", "carry"]
