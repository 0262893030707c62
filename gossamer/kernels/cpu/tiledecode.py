"""One-token decode on the CPU: weights as a tile bitmask, streamed once per call.

Shapes: T tokens (few), K inputs, M outputs, G groups of sixteen rows, P pairs of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gossamer.core.errors import DispatchError, FormatError
from gossamer.formats.tilebitmask import READ_AHEAD, ROWS, TileBitmask
from gossamer.kernels.cpu import decode
from gossamer.kernels.cpu.checks import activation_code, need_bias, need_tokens
from gossamer.kernels.cpu.decode import finishing_bias
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.target import features, supports

MOST_TOKENS = 8
_FLOATS = (torch.float32, torch.bfloat16)


@cache
def kernel_for(tokens: int, value_bytes: int):
    """The compiled kernel; Numba is imported here, on first use."""
    if reason := supports("bitmask_float32" if value_bytes == 4 else "bitmask_bfloat16"):
        raise DispatchError(f"{reason}; use a format that spmm serves, such as CSR")
    from gossamer.kernels.cpu import tilemask

    return tilemask.kernel(tokens, value_bytes)


def dots(weight: TileBitmask, x_bytes: int) -> bool:
    """Whether the bfloat16 dot product serves: bfloat16 on both sides, and a processor that has it."""
    both = weight.dtype is torch.bfloat16 and x_bytes == 2
    return both and {"avx512bf16", "avx512vbmi2"} <= features()


@dataclass(frozen=True)
class TileProduct:
    """A tile bitmask laid out for calls: what its densest tile keeps decides how much is loaded per tile.

    Args:
        weight: the stored weight [M, K], float32 or bfloat16, on the CPU.
        most: 0 if every tile keeps all of its 32 entries, 16 if none keeps more than 16, else 32.

    Raises:
        FormatError: the weight is neither float32 nor bfloat16, or not on the CPU.
    """

    weight: TileBitmask
    most: int

    @classmethod
    def of(cls, weight: TileBitmask) -> TileProduct:
        """Look the tiles over once."""
        if weight.dtype not in _FLOATS or weight.device.type != "cpu":
            raise FormatError(
                f"the tile product reads float32 and bfloat16 on the CPU, got {weight.dtype} on {weight.device}"
            )
        counts = weight.counts()
        if counts.numel() and int(counts.min()) == READ_AHEAD:
            return cls(weight, 0)
        return cls(weight, 16 if counts.numel() == 0 or int(counts.max()) <= 16 else 32)

    def launch(self, tokens: int, x_bytes: int, activation: int = 0, threads: int | None = None) -> Launch:
        """The kernel laid out for up to eight tokens; its addresses are x, bits, starts, values, bias or 0, and y."""
        rows, cols = self.weight.shape
        groups, pairs = self.weight.bits.shape
        padded = 1 << (tokens - 1).bit_length()
        wanted = max(1, min(threads or torch.get_num_threads(), ROWS * groups * 2 * pairs // decode.GRAIN))
        each = min(64, -(-groups // (4 * wanted if wanted > 1 else 1)))
        tasks = -(-groups // each)
        bytes_each = padded * (8 * pairs + 64 * each) + 64 & -64
        fixed = (
            tokens, rows, cols, pairs, groups, tasks, each, bytes_each, x_bytes, activation, self.most,
            int(dots(self.weight, x_bytes)),
        )  # fmt: skip
        crew = min(wanted, tasks)
        entry = kernel_for(padded, self.weight.values.element_size())
        return launch(entry, addresses=6, fixed=fixed, threads=crew, scratch_bytes=bytes_each * crew)

    def __call__(self, x_TK: Tensor, bias_M: Tensor | None = None, activation: str = "none") -> Tensor:
        """Multiply a few tokens by the weight: y = act(x Wᵀ + b), summed in float32.

        bfloat16 inputs are multiplied by the bfloat16 dot product, which takes numbers below 2^-126 as zero; any other
        pair of types goes through float32. A product with an infinite or NaN input skips what is not kept.

        Args:
            x_TK: float32 or bfloat16 [T, K], contiguous; more than eight tokens are taken eight at a time.
            bias_M: float32 [M].
            activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".

        Raises:
            DispatchError: this processor has no expanding loads; use a format that `spmm` serves.
            FormatError: a shape, dtype or layout does not fit.
            UnknownName: no such activation.

        Example:
            >>> product = TileProduct.of(TileBitmask.from_dense(torch.eye(4)))
            >>> product(torch.ones(1, 4)).tolist()
            [[1.0, 1.0, 1.0, 1.0]]
        """
        code, rows = activation_code(activation), self.weight.rows
        self._check(x_TK, bias_M)
        y_TM = torch.empty(x_TK.shape[0], rows, dtype=torch.float32, device="cpu")
        bias_M = finishing_bias(rows, bias_M, code)
        weight_at = tuple(part.data_ptr() for part in self.weight.parts().values())
        bias_at = 0 if bias_M is None else bias_M.data_ptr()
        size = x_TK.element_size()
        for first in range(0, x_TK.shape[0] if rows else 0, MOST_TOKENS):
            some = min(MOST_TOKENS, x_TK.shape[0] - first)
            x_at = x_TK.data_ptr() + first * x_TK.shape[1] * size
            y_at = y_TM.data_ptr() + 4 * first * rows
            self._laid_out(some, size, code).run(x_at, *weight_at, bias_at, y_at)
        return y_TM if x_TK.dtype is torch.float32 else y_TM.to(x_TK.dtype)

    def _laid_out(self, tokens: int, x_bytes: int, code: int) -> Launch:
        """Layouts are kept per size, activation and number of threads: making one costs as much as a small product."""
        asked = tokens, x_bytes, code, torch.get_num_threads(), decode.GRAIN
        kept = self.__dict__.setdefault("_launches", {})
        found = kept.get(asked)
        if found is None:
            found = kept[asked] = self.launch(tokens, x_bytes, code)
        return found

    def _check(self, x_TK: Tensor, bias_M: Tensor | None) -> None:
        need_tokens(x_TK, self.weight.cols)
        need_bias(self.weight.rows, bias_M)
