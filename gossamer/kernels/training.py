"""Gradients of a sparse product whose time and memory follow the kept entries: nothing of size [M, K] is ever made.

With dZ the gradient by the outputs of Z = X Wᵀ, the gradient by the inputs is dZ W, a product with Wᵀ; the gradient by
a kept weight is one inner product over the tokens, dW[e] = <dZ[:, row(e)], X[:, col(e)]>.

Wᵀ is a second stream laid out once per support: 16-bit rows, and the 32-bit place in W of each value. Its values are
gathered at each call, an eighth of the product's time for 128 tokens, so there is one set of weights to train.

Shapes: T tokens, M outputs, K inputs, E stored values, P panels of W = 64 tokens.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.formats import CSR, Format, RowGrouped
from gossamer.formats.checks import index_dtype, owners, pointer
from gossamer.kernels.dispatch import Call
from gossamer.kernels.lowering import group_rows, lower
from gossamer.kernels.sparse import Spmm

if TYPE_CHECKING:
    from gossamer.kernels.cpu.launch import Launch
    from gossamer.kernels.cpu.stream import Stream


class _Room(threading.local):
    """Memory that a thread keeps from step to step: fresh pages would cost as much as the products they serve."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def panels(self, name: str, tokens: int, features: int) -> Tensor:
        """Token panels [P, features, 64] in the memory kept under this name."""
        from gossamer.kernels.cpu.spmm_panels import aligned_panels
        from gossamer.kernels.cpu.tokens import panel_count

        shape = panel_count(1, tokens), features, 64
        count = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < count:
            self.kept[name] = aligned_panels(*shape).view(-1)
        return self.kept[name][:count].view(shape)


_room = _Room()


class _Turned(threading.local):
    """The stream of Wᵀ with values of this thread, and whatever was laid out for it."""

    stream: Stream | None = None


@dataclass(frozen=True, eq=False)
class Wiring:
    """One support, laid out for training.

    Args:
        forward: W as a stream without values: each call brings them.
        backward: Wᵀ as a stream, likewise, over the rows of W up to whole groups.
        origin_E: int32 [E], the place in W's values of each value of Wᵀ.
        order_M: the row of W that each stored row is, where rows are stored in an order of their own; or None.
        turned: Wᵀ with values, a copy for each thread.
    """

    forward: Stream
    backward: Stream
    origin_E: Tensor
    order_M: Tensor | None = None
    turned: _Turned = field(default_factory=_Turned)

    @classmethod
    def of(cls, fmt: CSR | RowGrouped) -> Wiring:
        """Lay out the support of a stored weight: one stable sort by column."""
        backward, origin_E = transposed(fmt)
        none_EG = torch.empty(0, 1)
        order = getattr(fmt, "order", none_EG)
        forward, backward = (replace(s, values_EG=none_EG, order_M=None) for s in (lower(fmt), backward))
        return cls(forward, backward, origin_E, order.long() if order.numel() else None)

    @property
    def rows(self) -> int:
        """Rows of W up to whole groups."""
        return self.forward.groups * self.forward.g

    def product(self, x_TK: Tensor, values: Tensor, bias_M: Tensor | None) -> Tensor:
        """X Wᵀ + b [T, M], for values in the order of the format."""
        from gossamer.kernels.cpu.spmm import spmm

        stored = replace(self.forward, values_EG=values.reshape(-1, self.forward.g))
        if self.order_M is None:
            return spmm(stored, x_TK.contiguous(), bias_M)
        y_TM = torch.empty(x_TK.shape[0], stored.rows, dtype=torch.float32, device="cpu")
        y_TM[:, self.order_M] = spmm(stored, x_TK.contiguous())
        return y_TM if bias_M is None else y_TM.add_(bias_M)

    def input_gradient(self, dz_PMW: Tensor, values: Tensor, tokens: int) -> Tensor:
        """dZ W [T, K], for values in the order of the format."""
        from gossamer.kernels.cpu.spmm_panels import spmm_panels

        stream = self._turned(values)
        dx_PKW = spmm_panels(stream, dz_PMW, out=_room.panels("dx", tokens, stream.rows))
        dx_TK = torch.empty(tokens, stream.rows, dtype=torch.float32, device="cpu")
        _to_rows(tokens, stream.rows, torch.get_num_threads()).run(dx_PKW.data_ptr(), dx_TK.data_ptr())
        return dx_TK

    def value_gradient(self, dz_PMW: Tensor, x_PKW: Tensor, tokens: int) -> Tensor:
        """The inner products of dZ and X at the kept entries, [E, g]."""
        from gossamer.kernels.cpu.sddmm import sampled_product

        return sampled_product(self.forward, dz_PMW, x_PKW, tokens=tokens)

    def _turned(self, values: Tensor) -> Stream:
        """Wᵀ with these values, gathered into memory of this thread."""
        if self.turned.stream is None:
            self.turned.stream = replace(self.backward, values_EG=torch.empty(self.origin_E.numel(), 1))
        torch.index_select(values.reshape(-1), 0, self.origin_E, out=self.turned.stream.values_EG.view(-1))
        return self.turned.stream


@lru_cache(maxsize=256)
def _to_panels(tokens: int, features: int, threads: int) -> Launch:
    from gossamer.kernels.cpu.tokens import plan_rows_to_panels

    return plan_rows_to_panels(1, tokens, features, threads=threads)


@lru_cache(maxsize=256)
def _to_rows(tokens: int, features: int, threads: int) -> Launch:
    from gossamer.kernels.cpu.tokens import plan_panels_to_rows

    return plan_panels_to_rows(1, tokens, features, threads=threads)


def _panels(name: str, x_TF: Tensor) -> Tensor:
    """Token panels of rows, in memory of this thread."""
    x_TF = x_TF.contiguous()
    panels = _room.panels(name, *x_TF.shape)
    _to_panels(*x_TF.shape, torch.get_num_threads()).run(x_TF.data_ptr(), panels.data_ptr())
    return panels


def transposed(fmt: CSR | RowGrouped) -> tuple[Stream, Tensor]:
    """The stream of Wᵀ, one row to a group, and where each of its values stands among those of W."""
    from gossamer.kernels.cpu.stream import stream

    g = group_rows(fmt)
    # Rows are those of storage; whoever multiplies brings them into that order.
    groups_E = owners(fmt.indptr, fmt.indices.numel())
    rows_V = (groups_E[:, None] * g + torch.arange(g)).reshape(-1)
    cols_V = fmt.indices.to(torch.int32).repeat_interleave(g)
    # Rows beyond the last one, of a ragged group, hold no weights.
    real_V = (rows_V < fmt.rows).nonzero().squeeze(1)
    order_V = real_V[cols_V[real_V].argsort(stable=True)]
    indptr = pointer(torch.bincount(cols_V[real_V], minlength=fmt.cols))
    rows_E = rows_V[order_V].to(index_dtype(fmt.rows))
    values_E1 = fmt.values.detach().reshape(-1)[order_V].view(-1, 1)
    return stream(1, fmt.cols, -(-fmt.rows // g) * g, indptr, rows_E, values_E1), order_V.to(torch.int32)


@dataclass(frozen=True)
class _Kept:
    """A wiring, and what the support was when it was made."""

    state: tuple
    wiring: Wiring


_WIRINGS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def wiring_of(fmt: CSR | RowGrouped, indices: Tensor) -> Wiring:
    """The wiring kept for this tensor of indices, made afresh when the support changed."""
    parts = [part for name, part in fmt.parts().items() if name != "values"]
    state = (fmt.shape, *((part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts))
    found = _WIRINGS.get(indices)
    if found is None or found.state != state:
        # Aliases, so that what is kept does not keep its own key alive.
        found = _Kept(state, Wiring.of(fmt.with_parts({name: part.detach() for name, part in fmt.parts().items()})))
        _WIRINGS[indices] = found
    return found.wiring


def serves(fmt: Format) -> bool:
    """Whether the gradients of a stored weight can be computed here at the cost of its kept entries."""
    if not isinstance(fmt, (CSR, RowGrouped)) or fmt.device.type != "cpu":
        return False
    return Spmm.refuse(Call(fmt, fmt.device, fmt.dtype, None)) is None


def gradients(
    wiring: Wiring, values: Tensor, dz_TM: Tensor, x_TK: Tensor, *, need_x: bool, need_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by the inputs [T, K] and by the stored values (in their shape), those that are needed.

    Args:
        wiring: the support.
        values: float32, of the stored weight.
        dz_TM: float32, the gradient by the outputs before any activation.
        x_TK: float32, the inputs.
        need_x: whether the first is wanted.
        need_values: whether the second is.

    Example:
        >>> dx, dw = gradients(wiring, w.values, dz, x, need_x=True, need_values=True)
    """
    tokens, rows = dz_TM.shape
    if not tokens or not rows or not x_TK.shape[1]:
        return torch.zeros_like(x_TK) if need_x else None, torch.zeros_like(values) if need_values else None
    if not need_x and not need_values:
        return None, None
    dz_TM = dz_TM if wiring.order_M is None else dz_TM.index_select(1, wiring.order_M)
    dz = _panels("dz", pad(dz_TM, (0, wiring.rows - rows)) if wiring.rows > rows else dz_TM)
    dvalues = wiring.value_gradient(dz, _panels("x", x_TK), tokens).view(values.shape) if need_values else None
    return wiring.input_gradient(dz, values, tokens) if need_x else None, dvalues


def kept_tensors(indices: Tensor) -> list[Tensor]:
    """What training keeps beside a layer's own tensors, for counting its bytes."""
    found = _WIRINGS.get(indices)
    if found is None:
        return []
    wiring = found.wiring
    streams = (wiring.forward, wiring.backward)
    laid_out = [t for s in streams for t in (s.starts_BG, s.indices_E, s.values_EG)]
    mine = [] if wiring.turned.stream is None else [wiring.turned.stream.values_EG]
    return [*laid_out, wiring.origin_E, *mine]
