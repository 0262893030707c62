"""Decode with 4-bit groups on the CPU: weights streamed once for every four tokens.

Shapes: T tokens (few), K inputs, M outputs, C chunks of eight kept groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gossamer.core.errors import DispatchError, FormatError
from gossamer.formats.int4groups import CHUNK, GROUP, Int4Groups
from gossamer.kernels.cpu import decode
from gossamer.kernels.cpu.checks import activation_code, need_bias, need_part, need_tokens
from gossamer.kernels.cpu.decode import finishing_bias
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.target import supports

MOST_TOKENS = 4


@cache
def kernel_for(tokens: int, whole: bool):
    """The compiled kernel; Numba is imported here, on first use."""
    if reason := supports("int4groups"):
        raise DispatchError(f"{reason}; multiply by `to_dense()`")
    from gossamer.kernels.cpu import int4

    return int4.kernel(tokens, int(whole))


@dataclass(frozen=True)
class Int4Product:
    """4-bit groups laid out for calls.

    Args:
        weight: the stored weight [M, K], on the CPU.
        whole: every group is kept, in order: the indices need not be read.
    """

    weight: Int4Groups
    whole: bool

    @classmethod
    def of(cls, weight: Int4Groups) -> Int4Product:
        """Look at the indices and scales once.

        Raises:
            FormatError: a part is not what the format says, or a scale is not finite.
        """
        chunks = weight.values.shape[0]
        need_part("indptr", weight.indptr, torch.int32, (weight.rows + 1,))
        need_part("indices", weight.indices, torch.uint16, (chunks, CHUNK))
        need_part("values", weight.values, torch.bfloat16, (chunks, 2))
        need_part("codes", weight.codes, torch.uint8, (chunks, CHUNK * GROUP // 2))
        if not bool(weight.values.isfinite().all()):
            raise FormatError(
                "the scales and lowest values of 4-bit groups must be finite, got NaN or infinity; pack anew"
            )
        groups = weight.cols // GROUP
        whole = groups % CHUNK == 0 and weight.indices.numel() == weight.rows * groups
        if whole and weight.rows:
            in_order = 4 * torch.arange(groups, dtype=torch.int32)
            whole = bool((weight.indices.int().view(weight.rows, groups) == in_order).all())
        return cls(weight, whole)

    def launch(self, tokens: int, x_bytes: int, activation: int = 0, threads: int | None = None) -> Launch:
        """The kernel laid out for up to four tokens: x, indptr, indices, values, codes, bias or 0, and y."""
        rows, cols = self.weight.shape
        padded = 1 << (tokens - 1).bit_length()
        wanted = max(1, min(threads or torch.get_num_threads(), self.weight.stored // decode.GRAIN))
        each = min(1024, 16 * -(-rows // (16 * (4 * wanted if wanted > 1 else 1))))
        tasks = -(-rows // each)
        x_row = 2 * (cols + GROUP)
        bytes_each = padded * (x_row + 4 * each) + 64
        fixed = (tokens, rows, cols, tasks, each, bytes_each, x_bytes, x_row, activation)
        crew = min(wanted, tasks)
        entry = kernel_for(padded, self.whole)
        return launch(entry, addresses=7, fixed=fixed, threads=crew, scratch_bytes=bytes_each * crew)

    def __call__(self, x_TK: Tensor, bias_M: Tensor | None = None, activation: str = "none") -> Tensor:
        """Multiply a few tokens: y = act(x Wᵀ + b), inputs taken in bfloat16, summed in float32.

        Args:
            x_TK: float32 or bfloat16 [T, K], contiguous; more than four tokens are taken four at a time.
            bias_M: float32 [M].
            activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".

        Raises:
            DispatchError: this processor has no bfloat16 dot product.
            FormatError: a shape, dtype or layout does not fit.
            UnknownName: no such activation.

        Example:
            >>> product = Int4Product.of(Int4Groups.from_dense(torch.ones(4, 16)))
            >>> product(torch.ones(1, 16)).tolist()
            [[16.0, 16.0, 16.0, 16.0]]
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
            x_at, y_at = x_TK.data_ptr() + first * x_TK.shape[1] * size, y_TM.data_ptr() + 4 * first * rows
            self._laid_out(some, size, code).run(x_at, *weight_at, bias_at, y_at)
        return y_TM if x_TK.dtype is torch.float32 else y_TM.to(x_TK.dtype)

    def _laid_out(self, tokens: int, x_bytes: int, code: int) -> Launch:
        asked = tokens, x_bytes, code, torch.get_num_threads(), decode.GRAIN
        kept = self.__dict__.setdefault("_launches", {})
        found = kept.get(asked)
        if found is None:
            found = kept[asked] = self.launch(tokens, x_bytes, code)
        return found

    def _check(self, x_TK: Tensor, bias_M: Tensor | None) -> None:
        need_tokens(x_TK, self.weight.cols)
        need_bias(self.weight.rows, bias_M)
