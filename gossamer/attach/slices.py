"""Slices: a delta on whole input columns or output rows of a weight, trained without the weight's gradient.

Shape suffixes: B positions, I inputs, O outputs, K of them that change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..core.errors import TargetError
from .delta import Delta, trained

Side = Literal["inputs", "outputs"]


class Slices(Delta):
    """w[:, index] + values (side "inputs") or w[index] + values (side "outputs").

    Args:
        values: [O, K] or [K, I], further axes of a convolution after them.
        index: which, int64 [K], no two the same.
        side: "inputs" or "outputs".
    """

    kind = "slices"

    def __init__(self, values: Tensor, index: Tensor, *, side: Side) -> None:
        super().__init__()
        self.values, self.side = trained(values), side
        self.register_buffer("index", index)

    def change(self, w: Tensor) -> Tensor:
        return torch.zeros_like(w).index_add(1 if self.side == "inputs" else 0, self.index, self.values.to(w.dtype))

    def product(self, x_BI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(x_BI.device.type) if _autocast(x_BI) else w_OI.dtype
        cast = [t if t is None else t.to(dtype) for t in (x_BI, w_OI, bias_O, self.values)]
        return (_Inputs if self.side == "inputs" else _Outputs).apply(*cast, self.index)

    def constants(self) -> dict[str, object]:
        return {"side": self.side}

    def low_rank(self, w: Tensor) -> tuple[Tensor, Tensor] | None:
        if w.dim() != 2:
            return None
        values = self.values.detach()
        size = w.shape[1 if self.side == "inputs" else 0]
        picks_KN = functional.one_hot(self.index, size).to(values.dtype)
        return (values, picks_KN) if self.side == "inputs" else (picks_KN.t().contiguous(), values)

    @classmethod
    def joined(cls, parts: Sequence[tuple[Delta, float]]) -> Slices:
        side = parts[0][0].side
        if any(delta.side != side for delta, _ in parts):
            raise TargetError("one adapter changes inputs and the other outputs; use({name: factor}) runs both")
        dim = 1 if side == "inputs" else 0
        index = torch.cat([delta.index for delta, _ in parts])
        values = torch.cat([factor * delta.values.detach() for delta, factor in parts], dim)
        union, place = index.unique(return_inverse=True)
        shape = list(values.shape)
        shape[dim] = len(union)
        return cls(values.new_zeros(shape).index_add_(dim, place, values), union, side=side)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


class _Inputs(torch.autograd.Function):
    """y = x·wᵀ + x[:, index]·valuesᵀ + bias; of x only the indexed columns are kept for the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, w_OI: Tensor, bias_O: Tensor | None, values_OK: Tensor, index_K: Tensor) -> Tensor:
        y = functional.linear(x, w_OI, bias_O)
        part_BK = x.index_select(-1, index_K).flatten(0, -2)
        y.view(-1, y.shape[-1]).addmm_(part_BK, values_OK.t())
        ctx.save_for_backward(x if w_OI.requires_grad else None, w_OI, values_OK, index_K, part_BK)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, values_OK, index_K, part_BK = ctx.saved_tensors
        g_BO = g.reshape(-1, g.shape[-1])
        by_x, by_w, by_bias, by_values = ctx.needs_input_grad[:4]
        g_BI = g_BO @ w_OI if by_x else None
        if g_BI is not None:
            g_BI.index_add_(1, index_K, g_BO @ values_OK)
        return (
            g_BI.view(*g.shape[:-1], -1) if g_BI is not None else None,
            g_BO.t() @ x.reshape(-1, x.shape[-1]) if by_w else None,
            g_BO.sum(0) if by_bias else None,
            g_BO.t() @ part_BK if by_values else None,
            None,
        )


class _Outputs(torch.autograd.Function):
    """y = x·wᵀ + bias, and x·valuesᵀ added to its indexed columns."""

    @staticmethod
    def forward(ctx, x: Tensor, w_OI: Tensor, bias_O: Tensor | None, values_KI: Tensor, index_K: Tensor) -> Tensor:
        y = functional.linear(x, w_OI, bias_O)
        y.index_add_(-1, index_K, functional.linear(x, values_KI))
        ctx.save_for_backward(x, w_OI, values_KI, index_K)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w_OI, values_KI, index_K = ctx.saved_tensors
        g_BO, x_BI = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        by_x, by_w, by_bias, by_values = ctx.needs_input_grad[:4]
        part_BK = g_BO.index_select(1, index_K)
        return (
            torch.addmm(g_BO @ w_OI, part_BK, values_KI).view_as(x) if by_x else None,
            g_BO.t() @ x_BI if by_w else None,
            g_BO.sum(0) if by_bias else None,
            part_BK.t() @ x_BI if by_values else None,
            None,
        )
