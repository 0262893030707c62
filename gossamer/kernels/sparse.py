"""The CPU kernels, as dispatch sees them: sparse x dense by streams, one-token decode by bitmasks.

Shapes: T tokens, M output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.formats import CSR, NM, Bitmask, Block, Int4Groups, KernelPatterns, RowGrouped, TileBitmask
from gossamer.kernels.dense import Unpack
from gossamer.kernels.dispatch import Call, kernel
from gossamer.kernels.lowering import group_rows, lower

if TYPE_CHECKING:
    from gossamer.kernels.cpu.int4decode import Int4Product
    from gossamer.kernels.cpu.narrow import Narrow
    from gossamer.kernels.cpu.stream import Stream
    from gossamer.kernels.cpu.tiledecode import TileProduct

# One pass over the weights serves 8 tokens. Where unpacking once and multiplying densely overtakes repeated passes
# was measured between 290 tokens (576 x 1536) and 630 (4096 x 4096), bfloat16 at density 0.5.
ONE_PASS = 8
MOST_DECODE_TOKENS = 256


def cannot_run_here(name: str, module: str) -> str | None:
    """The processor's or the installation's reason against a CPU kernel; None when it runs."""
    try:
        import_module(f"gossamer.kernels.cpu.{module}")
        broken = import_module("gossamer.kernels.cpu.trial").cannot_compile()
        return broken or import_module("gossamer.kernels.cpu.target").supports(name)
    except ImportError as error:
        return f"its compiler could not be imported ({error})"


@kernel("linear", CSR, RowGrouped, NM, Block, KernelPatterns, name="spmm", backend="cpu", devices=("cpu",))
@dataclass(frozen=True)
class Spmm:
    """Sparse x dense in float32, activations in panels that stay in the first-level cache."""

    # Streams share the memory of a format's values, so that training may change them under a plan.
    READS_IN_PLACE = True

    stream: Stream  # its rows in the order in which they are stored
    product: Callable[..., Tensor]
    product_of_columns: Callable[..., Tensor]
    order_M: Tensor | None = None  # of the stored rows, where it is not their own
    back_M: Tensor | None = None
    ordered: Stream | None = None  # the same with their order, for kernels that write rows through it

    @staticmethod
    def refuse(call: Call) -> str | None:
        if call.dtype != torch.float32:
            return f"spmm multiplies float32 only, the layer is {call.dtype}; pack it as float32 or as bitmask"
        if group_rows(call.fmt) not in (1, 2, 4, 8):
            return f"spmm groups 1, 2, 4 or 8 rows, the weight groups {group_rows(call.fmt)}"
        return cannot_run_here("spmm", "spmm")

    @classmethod
    def prepare(cls, call: Call) -> Spmm:
        from gossamer.kernels.cpu.spmm import spmm, spmm_columns

        ordered = lower(call.fmt)
        if (order_M := ordered.order_M) is None:
            return cls(ordered, spmm, spmm_columns, ordered=ordered)
        return cls(replace(ordered, order_M=None), spmm, spmm_columns, order_M, order_M.argsort(), ordered)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        y_TM = self.product(self.stream, x_TK, self._stored(bias_M), activation)
        return y_TM if self.back_M is None else y_TM.index_select(1, self.back_M)

    def run_columns(self, x_KN: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        """The same product over columns: x [K, N] to y [M, N], or of several images."""
        y_MN = self.product_of_columns(self.stream, x_KN, self._stored(bias_M), activation)
        return y_MN if self.back_M is None else y_MN.index_select(-2, self.back_M)

    def _stored(self, bias_M: Tensor | None) -> Tensor | None:
        """The bias in the order of the stored rows."""
        return bias_M if bias_M is None or self.order_M is None else bias_M.index_select(0, self.order_M)

    def laid_out(self) -> tuple[Tensor, ...]:
        orders = () if self.order_M is None or self.back_M is None else (self.order_M, self.back_M)
        return self.stream.starts_BG, self.stream.indices_E, self.stream.values_EG, *orders


@kernel("linear", CSR, RowGrouped, name="narrow", backend="cpu", devices=("cpu",))
@dataclass(frozen=True)
class NarrowProduct:
    """Sparse x dense in bfloat16: pairs of kept columns for the dot product, summed in float32."""

    NOTE = "weights copied in pairs of columns; activations go through panels and back at every call"

    weights: Narrow
    product: Callable[..., Tensor]
    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, int, int], Tensor]
    order_M: Tensor | None = None  # of the stored rows, where it is not their own
    back_M: Tensor | None = None

    @staticmethod
    def refuse(call: Call) -> str | None:
        if call.dtype != torch.bfloat16:
            return f"narrow multiplies bfloat16, the layer is {call.dtype}"
        if group_rows(call.fmt) not in (1, 2, 4, 8):
            return f"narrow groups 1, 2, 4 or 8 rows, the weight groups {group_rows(call.fmt)}"
        return cannot_run_here("spmm", "narrow_panels")

    @classmethod
    def prepare(cls, call: Call) -> NarrowProduct:
        from gossamer.kernels.cpu.narrow import narrow
        from gossamer.kernels.cpu.spmm_panels import spmm_panels
        from gossamer.kernels.cpu.tokens import panels_to_rows, rows_to_panels

        order = getattr(call.fmt, "order", None)
        orders = () if order is None or not order.numel() else (order.long(), order.argsort())
        return cls(narrow(call.fmt), spmm_panels, rows_to_panels, panels_to_rows, *orders)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        tokens = x_TK.shape[0]
        x_PKW = self.there(x_TK.float()).bfloat16()
        if bias_M is not None:
            bias_M = bias_M.float() if self.order_M is None else bias_M.float().index_select(0, self.order_M)
        y_PMW = torch.empty(x_PKW.shape[0], self.weights.rows, x_PKW.shape[2], device="cpu", dtype=torch.float32)
        # One panel need not be computed to its end.
        self.product(self.weights, x_PKW, bias_M, activation, out=y_PMW, used=tokens if x_PKW.shape[0] == 1 else None)
        y_TM = self.back(y_PMW, 1, tokens).squeeze(0).bfloat16()
        return y_TM if self.back_M is None else y_TM.index_select(1, self.back_M)

    def laid_out(self) -> tuple[Tensor, ...]:
        orders = () if self.order_M is None or self.back_M is None else (self.order_M, self.back_M)
        return self.weights.starts_G, self.weights.indices_Rd, self.weights.values_Rgd, *orders


@kernel("linear", Bitmask, name="decode", backend="cpu", devices=("cpu",))
@dataclass(frozen=True)
class Decode:
    """Weights streamed from memory once for every 8 tokens; long prompts unpack the weight and multiply densely."""

    NOTE = "eight tokens a pass by expand-load decode; over 256 at once (a prompt) by unpacking and a dense product"

    fmt: Bitmask
    product: Callable[..., Tensor]

    @staticmethod
    def refuse(call: Call) -> str | None:
        if call.tokens is not None and call.tokens > ONE_PASS:
            return f"decode is for up to {ONE_PASS} tokens at once, the call has {call.tokens}; take csr or dense"
        if call.dtype not in (torch.float32, torch.bfloat16):
            return f"decode reads float32 and bfloat16 values, the layer is {call.dtype}"
        return cannot_run_here(f"bitmask_{str(call.dtype).removeprefix('torch.')}", "decode")

    @classmethod
    def prepare(cls, call: Call) -> Decode:
        from gossamer.kernels.cpu.decode import bitmask_matvec

        return cls(call.fmt, bitmask_matvec)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        if x_TK.shape[0] > MOST_DECODE_TOKENS:
            return Unpack(self.fmt).run(x_TK, bias_M, activation)
        fmt, bias_M = self.fmt, None if bias_M is None else bias_M.float()
        return self.product(fmt.bits, fmt.offsets, fmt.values, fmt.rows, fmt.cols, x_TK, bias_M, activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return ()


@kernel("linear", TileBitmask, name="tiles", backend="cpu", devices=("cpu",))
@dataclass(frozen=True)
class Tiles:
    """Weights streamed from memory once for every 8 tokens, tile by tile; long prompts unpack and multiply densely."""

    NOTE = Decode.NOTE

    fmt: TileBitmask
    product: TileProduct

    @staticmethod
    def refuse(call: Call) -> str | None:
        return Decode.refuse(call)

    @classmethod
    def prepare(cls, call: Call) -> Tiles:
        from gossamer.kernels.cpu.memory import large_pages
        from gossamer.kernels.cpu.tiledecode import TileProduct

        large_pages(call.fmt.bits, call.fmt.values)
        return cls(call.fmt, TileProduct.of(call.fmt))

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        if x_TK.shape[0] > MOST_DECODE_TOKENS:
            return Unpack(self.fmt).run(x_TK, bias_M, activation)
        return self.product(x_TK, None if bias_M is None else bias_M.float(), activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return ()


@kernel("linear", Int4Groups, name="int4", backend="cpu", devices=("cpu",))
@dataclass(frozen=True)
class Int4:
    """4-bit groups streamed from memory once for every 4 tokens; long prompts unpack and multiply densely."""

    NOTE = "four tokens a pass over 4-bit codes; over 256 at once (a prompt) by unpacking and a dense product"

    fmt: Int4Groups
    product: Int4Product

    @staticmethod
    def refuse(call: Call) -> str | None:
        if call.tokens is not None and call.tokens > ONE_PASS:
            return f"int4 is for up to {ONE_PASS} tokens at once, the call has {call.tokens}"
        return cannot_run_here("int4groups", "int4decode")

    @classmethod
    def prepare(cls, call: Call) -> Int4:
        from gossamer.kernels.cpu.int4decode import Int4Product
        from gossamer.kernels.cpu.memory import large_pages

        large_pages(call.fmt.codes, call.fmt.indices)
        return cls(call.fmt, Int4Product.of(call.fmt))

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        if x_TK.shape[0] > MOST_DECODE_TOKENS:
            return Unpack(self.fmt).run(x_TK, bias_M, activation)
        return self.product(x_TK, None if bias_M is None else bias_M.float(), activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return ()
