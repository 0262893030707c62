"""Entries: a delta on any chosen entries of a weight.

Shape suffixes: B positions, I inputs, O outputs, N entries that change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .delta import Delta, trained


class Entries(Delta):
    """w.flatten()[index] + values, of the weight with outputs first.

    Only the values, their gradient and their moments are kept. While a layer's backward pass runs, the gradient of its
    whole weight exists, for that one layer.

    Args:
        values: [N].
        index: flat positions, int64 [N], no two the same.
    """

    kind = "entries"

    def __init__(self, values: Tensor, index: Tensor) -> None:
        super().__init__()
        self.values = trained(values)
        self.register_buffer("index", index)

    def numbers(self) -> Tensor:
        """What is added, [N]."""
        return self.values

    def change(self, w: Tensor) -> Tensor:
        return added(torch.zeros(w.shape, dtype=w.dtype, device=w.device), self.index, self.numbers())

    def product(self, x_BI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
        if torch.is_autocast_enabled(x_BI.device.type):
            return None
        return _Chosen.apply(x_BI, w_OI, bias_O, self.numbers().to(w_OI.dtype), self.index)

    @classmethod
    def joined(cls, parts: Sequence[tuple[Delta, float]]) -> Entries:
        index = torch.cat([delta.index for delta, _ in parts])
        values = torch.cat([factor * delta.numbers().detach() for delta, factor in parts])
        union, place = index.unique(return_inverse=True)
        return Entries(values.new_zeros(len(union)).index_add(0, place, values), union)


def added(dense: Tensor, index_N: Tensor, values_N: Tensor) -> Tensor:
    """A dense tensor with the values added at flat positions."""
    return dense.reshape(-1).index_add(0, index_N, values_N.to(dense.dtype)).view(dense.shape)


class _Chosen(torch.autograd.Function):
    """y = x·(w + values)ᵀ + bias. The sum is made again on the way back, or every layer would keep a copy of its w."""

    @staticmethod
    def forward(ctx, x: Tensor, w_OI: Tensor, bias_O: Tensor | None, values_N: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(x, w_OI, values_N, index_N)
        return functional.linear(x, added(w_OI, index_N, values_N), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, values_N, index_N = ctx.saved_tensors
        g_BO, x_BI = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        by_x, by_w, by_bias, by_values = ctx.needs_input_grad[:4]
        dense_OI = g_BO.t() @ x_BI if by_w or by_values else None
        return (
            (g_BO @ added(w_OI, index_N, values_N)).view_as(x) if by_x else None,
            dense_OI if by_w else None,
            g_BO.sum(0) if by_bias else None,
            dense_OI.flatten()[index_N] if by_values else None,
            None,
        )
