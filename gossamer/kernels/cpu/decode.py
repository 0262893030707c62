"""One-token decode on the CPU: weights as a bitmask with packed values, streamed once per call.

Shapes: T tokens (few), K inputs, M outputs, B mask bytes of a row.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from gossamer.core.errors import DispatchError, FormatError
from gossamer.kernels.cpu.checks import activation_code, need_bias, need_part, need_tokens
from gossamer.kernels.cpu.target import supports
from gossamer.kernels.cpu.workplace import workplace

MOST_TOKENS = 8
_FLOATS = (torch.float32, torch.bfloat16)
# Values that may be read past the last: one whole step.
_READ_AHEAD = 16
# Mask bits that pay for waking one more thread: about ten microseconds of work.
GRAIN = 300_000
_pack_into = struct.Struct("=19q").pack_into
_kernels: dict[tuple[int, int], object] = {}
_zero_bias: dict[int, Tensor] = {}


def kernel_for(tokens: int, value_bytes: int):
    """The compiled kernel; Numba is imported here, on first use."""
    found = _kernels.get((tokens, value_bytes))
    if found is None:
        if reason := supports("bitmask_float32" if value_bytes == 4 else "bitmask_bfloat16"):
            raise DispatchError(f"{reason}; use a format that spmm serves, such as CSR")
        from gossamer.kernels.cpu import bitmask

        found = _kernels[tokens, value_bytes] = bitmask.kernel(tokens, value_bytes)
    return found


def bitmask_matvec(
    bits: Tensor,
    offsets: Tensor,
    values: Tensor,
    rows: int,
    cols: int,
    x_TK: Tensor,
    bias_M: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Multiply a few tokens by bitmask weights: y = act(x Wᵀ + b), summed in float32.

    Args:
        bits: uint8 [M, 2 * ceil(K / 16)], bit j of a row (little bit order) keeps column j; bits past K are zero.
        offsets: int32 [M + 1], where each row's values start.
        values: float32 or bfloat16 [kept + 16]; the last sixteen are readable padding.
        rows: M.
        cols: K.
        x_TK: float32 or bfloat16 [T, K], contiguous; more than eight tokens are taken eight at a time.
        bias_M: float32 [M].
        activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".

    Raises:
        DispatchError: this processor has no expanding loads; use a format that `spmm` serves.
        FormatError: a shape, dtype or layout does not fit.
        UnknownName: no such activation.

    Example:
        >>> y = bitmask_matvec(w.bits, w.offsets, w.values, w.rows, w.cols, torch.randn(1, w.cols))
    """
    code = activation_code(activation)
    _check(bits, offsets, values, rows, cols, x_TK, bias_M)
    tokens = x_TK.shape[0]
    y_TM = torch.empty(tokens, rows, dtype=torch.float32, device="cpu")
    if rows:
        bias_M = finishing_bias(rows, bias_M, code)
        weight_at = bits.data_ptr(), offsets.data_ptr(), values.data_ptr()
        x_at, x_bytes, y_at = x_TK.data_ptr(), x_TK.element_size(), y_TM.data_ptr()
        for first in range(0, tokens, MOST_TOKENS):
            some = min(MOST_TOKENS, tokens - first)
            x_now, y_now = x_at + first * cols * x_bytes, y_at + 4 * first * rows
            _launch(weight_at, values.element_size(), rows, cols, some, x_now, x_bytes, bias_M, code, y_now)
    return y_TM if x_TK.dtype is torch.float32 else y_TM.to(x_TK.dtype)


def finishing_bias(rows: int, bias_M: Tensor | None, code: int) -> Tensor | None:
    """Decode kernels finish outputs only where there is a bias, so an activation alone takes a bias of zeros."""
    if bias_M is not None or code == 0:
        return bias_M
    if rows not in _zero_bias:
        _zero_bias[rows] = torch.zeros(rows, dtype=torch.float32, device="cpu")
    return _zero_bias[rows]


def _check(bits, offsets, values, rows, cols, x_TK, bias_M) -> None:
    width = 2 * -(-cols // 16)
    need_part("bits", bits, torch.uint8, (rows, width))
    need_part("offsets", offsets, torch.int32, (rows + 1,))
    if values.dtype not in _FLOATS:
        raise FormatError(f"values must be float32 or bfloat16, got {values.dtype}; convert them when packing")
    need_part("values", values, values.dtype, (int(offsets[-1]) + _READ_AHEAD,))
    need_tokens(x_TK, cols)
    need_bias(rows, bias_M)


def _launch(weight_at, value_bytes, rows, cols, tokens, x_at, x_bytes, bias_M, code, y_at) -> None:
    """One pass over the weights for at most eight tokens; everything in memory by its address."""
    width, padded = 16 * -(-cols // 16), 1 << (tokens - 1).bit_length()
    entry = kernel_for(padded, value_bytes)
    wanted = max(1, min(torch.get_num_threads(), rows * width // GRAIN))
    # Rows per task: four tasks a thread even out the load; whole cache lines of y, sixteen floats, stay together.
    each = min(1024, 16 * -(-rows // (16 * (4 * wanted if wanted > 1 else 1))))
    tasks = -(-rows // each)
    threads = min(wanted, tasks)
    scratch_bytes = 4 * padded * (width + each) + 64
    place = workplace
    scratch_at = place.scratch_of(scratch_bytes * threads)
    bits_at, offsets_at, values_at = weight_at
    _pack_into(
        place.args, 0,
        0, 0, tasks, each, scratch_at, scratch_bytes, x_at, x_bytes, y_at,
        tokens, rows, cols, bits_at, width // 8, offsets_at, values_at,
        0 if bias_M is None else bias_M.data_ptr(), code, width,
    )  # fmt: skip
    entry.run(place.args_at, threads)
