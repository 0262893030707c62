"""One-token decode of N:M weights in Triton: values and packed positions are read once, x is gathered from the cache.

Shapes: T tokens (few), K inputs, M outputs, S slots a row. A program computes one output for up to eight tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.formats import NM
from gossamer.formats.nm import position_bits

TOKENS, STEP = 8, 1024


@triton.jit
def _rows(
    values, positions, x, y, T, M, K, slots, row_bytes,
    N: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS,), tl.float32)
    per_byte: tl.constexpr = 8 // BITS
    for first in range(0, slots, STEP):
        slot = first + tl.arange(0, STEP)
        inside = slot < slots
        octet = tl.load(positions + row * row_bytes + slot // per_byte, mask=inside, other=0).to(tl.int32)
        column = slot // N * GROUP + ((octet >> (slot % per_byte * BITS)) & ((1 << BITS) - 1))
        w = tl.load(values + row * slots + slot, mask=inside, other=0.0).to(tl.float32)
        wanted = (token[:, None] < T) & inside[None, :]
        x_TS = tl.load(x + token[:, None].to(tl.int64) * K + column[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += tl.sum(w[None, :] * x_TS, 1)
    tl.store(y + token.to(tl.int64) * M + row, total, mask=token < T)


def nm_product(fmt: NM, x_TK: Tensor) -> Tensor:
    """x Wᵀ for a few tokens, summed in float32: float32 [T, M].

    Args:
        fmt: the weights [M, K], on the device of x.
        x_TK: float32, bfloat16 or float16 [T, K], contiguous.
    """
    tokens, slots = x_TK.shape[0], fmt.values.shape[1]
    y_TM = torch.zeros(tokens, fmt.rows, dtype=torch.float32, device=x_TK.device)
    if y_TM.numel() and slots:
        some = min(TOKENS, triton.next_power_of_2(tokens))
        _rows[fmt.rows, triton.cdiv(tokens, some)](
            fmt.values, fmt.positions, x_TK, y_TM, tokens, fmt.rows, fmt.cols, slots, fmt.positions.shape[1],
            N=fmt.n, GROUP=fmt.m, BITS=position_bits(fmt.m), TOKENS=some, STEP=min(STEP, triton.next_power_of_2(slots)),
        )  # fmt: skip
    return y_TM
