"""One-token decode of bitmask weights in Triton: every kept value is read once, its column follows from the mask.

Shapes: T tokens (few), K inputs, M outputs. A program computes one output for up to eight tokens: it walks the row's
mask, and a running count of set bits says where the next values lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.formats import Bitmask

TOKENS = 8
# Columns of a step; 1,024 bits are 128 mask bytes, one transaction.
STEP = 1024


@triton.jit
def _rows(bits, offsets, values, x, y, T, M, K, row_bytes, TOKENS: tl.constexpr, STEP: tl.constexpr):
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start = tl.load(offsets + row)
    total = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, K, STEP):
        column = first + tl.arange(0, STEP)
        inside = column < K
        octet = tl.load(bits + row.to(tl.int64) * row_bytes + column // 8, mask=inside, other=0).to(tl.int32)
        kept = (octet >> (column % 8)) & 1
        place = start + tl.cumsum(kept, 0) - kept
        w = tl.load(values + place, mask=kept == 1, other=0.0).to(tl.float32)
        wanted = (token[:, None] < T) & (kept == 1)[None, :]
        x_TS = tl.load(x + token[:, None].to(tl.int64) * K + column[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += tl.sum(w[None, :] * x_TS, 1)
        start += tl.sum(kept, 0)
    tl.store(y + token.to(tl.int64) * M + row, total, mask=token < T)


def bitmask_product(fmt: Bitmask, x_TK: Tensor) -> Tensor:
    """x Wᵀ for a few tokens, summed in float32: float32 [T, M].

    Args:
        fmt: the weights [M, K], on the device of x.
        x_TK: float32, bfloat16 or float16 [T, K], contiguous.
    """
    tokens = x_TK.shape[0]
    y_TM = torch.zeros(tokens, fmt.rows, dtype=torch.float32, device=x_TK.device)
    if y_TM.numel() and fmt.cols:
        step = min(STEP, triton.next_power_of_2(fmt.cols))
        some = min(TOKENS, triton.next_power_of_2(tokens))
        grid = (fmt.rows, triton.cdiv(tokens, some))
        parts = fmt.bits, fmt.offsets, fmt.values
        _rows[grid](*parts, x_TK, y_TM, tokens, fmt.rows, fmt.cols, fmt.bits.shape[1], TOKENS=some, STEP=step)
    return y_TM
