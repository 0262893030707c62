"""The product by block-sparse weights in Triton: a program owns one row of blocks and a tile of tokens.

Shapes: T tokens, K inputs, M outputs, blocks of a rows by b columns, padded to powers of two inside the program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.formats import Block

TOKENS = 64
# Tensor cores multiply tiles of at least sixteen; smaller blocks are summed lane by lane.
SMALLEST_DOT = 16


@triton.jit
def _block_row(
    starts, columns, values, x, y, T, M, K,
    A: tl.constexpr, B: tl.constexpr, A_PAD: tl.constexpr, B_PAD: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    block_row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    a, b = tl.arange(0, A_PAD), tl.arange(0, B_PAD)
    total = tl.zeros((TOKENS, A_PAD), tl.float32)
    known = (b < B)[:, None] & (a < A)[None, :]
    first = tl.load(starts + block_row)
    block = values + first.to(tl.int64) * (A * B) + b[:, None] * A + a[None, :]
    for p in range(first, tl.load(starts + block_row + 1)):
        column = tl.load(columns + p) * B + b
        w_BA = tl.load(block, mask=known, other=0.0)
        block += A * B
        wanted = (token < T)[:, None] & ((b < B) & (column < K))[None, :]
        x_TB = tl.load(x + token[:, None].to(tl.int64) * K + column[None, :], mask=wanted, other=0.0)
        if DOT:
            total += tl.dot(x_TB, w_BA, input_precision="ieee")
        else:
            total += tl.sum(x_TB.to(tl.float32)[:, :, None] * w_BA.to(tl.float32)[None, :, :], 1)
    row = block_row * A + a
    written = (token < T)[:, None] & ((a < A) & (row < M))[None, :]
    tl.store(y + token[:, None].to(tl.int64) * M + row[None, :], total, mask=written)


def block_product(fmt: Block, columns: Tensor, x_TK: Tensor) -> Tensor:
    """x Wᵀ, summed in float32: float32 [T, M].

    Args:
        fmt: the weights [M, K], on the device of x.
        columns: the block columns of `fmt` as int32, which Triton loads on every device.
        x_TK: float32, bfloat16 or float16 [T, K], contiguous.
    """
    tokens, high, wide = x_TK.shape[0], triton.next_power_of_2(fmt.a), triton.next_power_of_2(fmt.b)
    y_TM = torch.zeros(tokens, fmt.rows, dtype=torch.float32, device=x_TK.device)
    if y_TM.numel() and columns.numel():
        dot = min(high, wide) >= SMALLEST_DOT
        # Lane by lane, tokens x b x a products are held at once: keep them to what registers hold.
        most = TOKENS if dot else max(1, 8192 // (high * wide))
        some = max(SMALLEST_DOT if dot else 1, min(most, triton.next_power_of_2(tokens)))
        _block_row[triton.cdiv(fmt.rows, fmt.a), triton.cdiv(tokens, some)](
            fmt.indptr, columns, fmt.values, x_TK, y_TM, tokens, fmt.rows, fmt.cols,
            A=fmt.a, B=fmt.b, A_PAD=high, B_PAD=wide, TOKENS=some, DOT=dot,
        )  # fmt: skip
    return y_TM
