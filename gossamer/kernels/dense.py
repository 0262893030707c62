"""Products by a dense matrix: torch's own, oneDNN's, and one that unpacks a compressed weight at every call.

Shapes: T tokens, M output rows, K input columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from gossamer.formats import CSR, NM, Bitmask, Block, Dense, Format, Int4Groups, KernelPatterns, RowGrouped, TileBitmask
from gossamer.kernels.dispatch import Call, kernel
from gossamer.kernels.reference import activate, spmm_reference

# oneDNN's names for the activations: (attribute, algorithm).
FUSED = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "hard_swish": ("hardswish", ""),
}


@kernel("linear", Dense, name="linear", backend="dense")
@dataclass(frozen=True)
class Linear:
    """torch's F.linear."""

    fmt: Format

    @staticmethod
    def refuse(call: Call) -> str | None:
        return None

    @classmethod
    def prepare(cls, call: Call) -> Linear:
        return cls(call.fmt)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        return activate(linear(x_TK, self.fmt.values, bias_M), activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return ()


@kernel("linear", Dense, name="linear", backend="onednn", devices=("cpu",))
@dataclass(frozen=True)
class OneDNN:
    """oneDNN's inner product, with the activation fused, over weights re-ordered once (plain ones work, too).

    Often faster than F.linear on AMD processors, where torch's BLAS keeps to AVX2; benchmarks/results has both. The
    operators are torch's own but undocumented, so they are looked up and checked against F.linear before first use.
    """

    weight: Tensor

    @staticmethod
    def refuse(call: Call) -> str | None:
        if 0 in call.fmt.shape:
            return "an empty matrix cannot be re-ordered"
        return onednn_refusal(call.dtype)

    @classmethod
    def prepare(cls, call: Call) -> OneDNN:
        return cls(torch.ops.mkldnn._reorder_linear_weight(call.fmt.values.detach(), call.tokens or None))

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        attribute, algorithm = FUSED.get(activation, FUSED["none"])
        y_TM = torch.ops.mkldnn._linear_pointwise(x_TK, self.weight, bias_M, attribute, [], algorithm)
        return y_TM if activation in FUSED else activate(y_TM, activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return (self.weight,)


@cache
def onednn_refusal(dtype: torch.dtype) -> str | None:
    """Why oneDNN cannot multiply in this dtype here; None when a small product came out right."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return "this torch has no oneDNN linear operators"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"oneDNN multiplies float32, bfloat16 and float16, not {dtype}"
    try:
        return _disagreement(dtype)
    except RuntimeError as error:
        return f"oneDNN refused {dtype}: {str(error).splitlines()[0]}"


def _disagreement(dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    w_MK, x_TK, bias_M = (torch.randn(*size, generator=generator).to(dtype) for size in ((33, 47), (5, 47), (33,)))
    want = linear(x_TK.double(), w_MK.double(), bias_M.double()).relu()
    layouts = (w_MK, torch.ops.mkldnn._reorder_linear_weight(w_MK, 5))
    results = [torch.ops.mkldnn._linear_pointwise(x_TK, w, bias_M, "relu", [], "") for w in layouts]
    # Room for one rounding of a result near 20 in the storage dtype.
    allowed = 64 * torch.finfo(dtype).eps
    worst = max(float((got.double() - want).abs().max()) for got in results)
    return None if worst <= allowed else f"oneDNN was off by {worst:.2g} in a {dtype} trial product"


_COMPRESSED = (CSR, Bitmask, TileBitmask, NM, RowGrouped, Block, Int4Groups, KernelPatterns)


@kernel("linear", *_COMPRESSED, name="linear", backend="unpack")
@dataclass(frozen=True)
class Unpack:
    """Unpack the weight at each call and multiply densely: memory stays small, any device and dtype."""

    NOTE = "stays compressed in memory; each call unpacks it into a dense matrix and drops that again"

    fmt: Format

    @staticmethod
    def refuse(call: Call) -> str | None:
        return None

    @classmethod
    def prepare(cls, call: Call) -> Unpack:
        return cls(call.fmt)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        w_MK = self.fmt.to_dense().to(x_TK.dtype)
        if x_TK.device.type == "cpu" and 0 not in self.fmt.shape and onednn_refusal(x_TK.dtype) is None:
            return OneDNN(w_MK).run(x_TK, bias_M, activation)
        return activate(linear(x_TK, w_MK, bias_M), activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return ()


@kernel("linear", Format, name="twin", backend="reference")
@dataclass(frozen=True)
class Twin:
    """The plain torch twin: the yardstick for every other kernel."""

    fmt: Format

    @staticmethod
    def refuse(call: Call) -> str | None:
        return None

    @classmethod
    def prepare(cls, call: Call) -> Twin:
        return cls(call.fmt)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        return spmm_reference(self.fmt, x_TK, bias_M, activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return ()
