"""The Triton kernels, as dispatch sees them: decode of bitmask and N:M weights, products by blocks.

Shapes: T tokens, M output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from gossamer.formats import NM, Bitmask, Block
from gossamer.kernels.dense import Unpack
from gossamer.kernels.dispatch import Call, kernel
from gossamer.kernels.reference import activate
from gossamer.kernels.triton.available import cannot_run

# Beyond this many tokens at once, unpacking the weight and multiplying densely reads less than decoding it again for
# every eight; not measured on a GPU yet, so chosen where eight passes have been made.
MOST_DECODE_TOKENS = 64
_DEVICES = ("cuda", "cpu")


def _finished(y_TM: Tensor, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
    """Bias and activation in float32, then the dtype of x."""
    y_TM = y_TM if bias_M is None else y_TM + bias_M.float()
    return activate(y_TM, activation).to(x_TK.dtype)


@dataclass(frozen=True)
class _Decode:
    """Weights decoded once for every eight tokens; long prompts unpack them and multiply densely."""

    NOTE = f"eight tokens a pass in Triton; over {MOST_DECODE_TOKENS} at once by unpacking and a dense product"

    fmt: Bitmask | NM
    product: Callable[..., Tensor]

    @staticmethod
    def refuse(call: Call) -> str | None:
        return cannot_run(call.device, call.dtype)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        if x_TK.shape[0] > MOST_DECODE_TOKENS:
            return Unpack(self.fmt).run(x_TK, bias_M, activation)
        return _finished(self.product(self.fmt, x_TK), x_TK, bias_M, activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return ()


@kernel("linear", Bitmask, name="bitmask", backend="triton", devices=_DEVICES)
class BitmaskDecode(_Decode):
    """Bitmask weights, a few tokens."""

    @classmethod
    def prepare(cls, call: Call) -> BitmaskDecode:
        return cls(call.fmt, import_module("gossamer.kernels.triton.bitmask").bitmask_product)


@kernel("linear", NM, name="nm", backend="triton", devices=_DEVICES)
class NMDecode(_Decode):
    """N:M weights, a few tokens."""

    @classmethod
    def prepare(cls, call: Call) -> NMDecode:
        return cls(call.fmt, import_module("gossamer.kernels.triton.nm").nm_product)


@kernel("linear", Block, name="block", backend="triton", devices=_DEVICES)
@dataclass(frozen=True)
class BlockProduct:
    """Block weights, any number of tokens."""

    fmt: Block
    columns: Tensor
    product: Callable[..., Tensor]

    @staticmethod
    def refuse(call: Call) -> str | None:
        if call.fmt.a * call.fmt.b > 4096:
            return f"Triton holds blocks of up to 4096 entries at once, the weight's are {call.fmt.a}x{call.fmt.b}"
        return cannot_run(call.device, call.dtype)

    @classmethod
    def prepare(cls, call: Call) -> BlockProduct:
        product = import_module("gossamer.kernels.triton.block").block_product
        return cls(call.fmt, call.fmt.indices.to(torch.int32), product)

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        return _finished(self.product(self.fmt, self.columns, x_TK), x_TK, bias_M, activation)

    def laid_out(self) -> tuple[Tensor, ...]:
        return (self.columns,)
