"""What a decoder does between its products, one kernel each, and the chain that runs a whole token in one call.

Shapes: D width of the model, I width of the gated layer, H query heads and N key heads of d numbers, S most tokens.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.lanes import _I8, _I32, _int, _store, address_of, copy_row, get, take
from gossamer.kernels.cpu.launch import ADDRESSES, NEXT, SCRATCH, SLOT, Launch, launch
from gossamer.kernels.cpu.step_lanes import (
    LANES,
    keep_column,
    mix_values,
    rms_norm_row,
    silu_times_row,
    turn_heads,
    weigh_keys,
)
from gossamer.kernels.cpu.threads import Entry, gomp_parallel

_A, _B, _C, _D, _E, _F, _G, _H, _I, _J, _K, _L = range(ADDRESSES, ADDRESSES + 96, 8)


def _need(what: str, size: int, step: int) -> None:
    if size % step or size < step:
        raise FormatError(f"{what} must be a multiple of {step}, got {size}; the decoder works in whole vectors")


@functools.cache
def _norm(out_bytes: int) -> Entry:
    size = out_bytes

    def norm_kernel(pointer):
        args = address_of(pointer)
        if take(args + NEXT) == 0:
            rms_norm_row(size, get(args + _A), get(args + _B), get(args + _E), get(args + _C), get(args + _D))

    return Entry(compile_kernel(norm_kernel, f"one-token norm, {8 * size}-bit results"))


def plan_norm(width: int, out_bytes: int) -> Launch:
    """x / sqrt(mean(x²) + eps) · weight for one row: its addresses are x, weight, eps and the result.

    Raises:
        FormatError: the width is not a multiple of 16.
    """
    _need("the width of a norm", width, LANES)
    return launch(_norm(out_bytes), addresses=4, fixed=(width,), threads=1)


@functools.cache
def _gate(out_bytes: int) -> Entry:
    size = out_bytes

    def gate_kernel(pointer):
        args = address_of(pointer)
        if take(args + NEXT) == 0:
            count = get(args + _C)
            silu_times_row(size, get(args + _A), get(args + _A) + 4 * count, count, get(args + _B))

    return Entry(compile_kernel(gate_kernel, f"one-token gate, {8 * size}-bit results"))


def plan_gate(width: int, out_bytes: int) -> Launch:
    """silu(g) · u for one row [g, u] of 2 · width numbers: its addresses are the row and the result.

    Raises:
        FormatError: the width is not a multiple of 16.
    """
    _need("the width of a gate", width, LANES)
    return launch(_gate(out_bytes), addresses=2, fixed=(width,), threads=1)


@functools.cache
def _attend(lanes: int, vectors: int, out_bytes: int) -> Entry:
    L, V, size, turn = lanes, vectors, out_bytes, min(lanes, lanes * vectors // 2)

    def attend_kernel(pointer):
        args = address_of(pointer)
        if take(args + NEXT) == 0:
            rows, turns, at = get(args + _A), get(args + _B), get(get(args + _C))
            keys, values, scale, out = get(args + _D), get(args + _E), get(args + _F), get(args + _G)
            heads, key_heads, most, width = get(args + _H), get(args + _I), get(args + _J), L * V
            cosine = turns + 4 * at * width
            turn_heads(turn, rows, heads + key_heads, width, cosine, cosine + 2 * width)
            new, scores = rows + 4 * heads * width, get(args + SCRATCH)
            for n in range(key_heads):
                keep_column(new + 4 * n * width, keys + 4 * (n * width * most + at), width, most)
                value = new + 4 * (key_heads + n) * width
                copy_row(16, value, values + 4 * (n * most + at) * width, width, width)
            shared = heads // key_heads
            for h in range(heads):
                n = h // shared
                weigh_keys(rows + 4 * h * width, keys + 4 * n * width * most, width, most, at + 1, scale, scores)
                mix_values(L, V, size, scores, values + 4 * n * most * width, width, at + 1, out + size * h * width)

    return Entry(compile_kernel(attend_kernel, f"one-token attention, {L * V} wide"))


def plan_attend(heads: int, key_heads: int, width: int, most: int, out_bytes: int) -> Launch:
    """Rotate, keep and attend for one token.

    Its addresses are: the row [H + 2 N, d] of queries, keys and values (turned in place), the table of turns [S, 2,
    d / 2] of cosines and sines, the token's position (int64), the keys [N, d, S] and values [N, S, d] kept so far, the
    scale (float32), and the result [H d].

    Raises:
        FormatError: d is not a multiple of 8, S not one of 16, or the heads do not share evenly.
    """
    _need("the width of a head", width, 8)
    _need("the most tokens", most, LANES)
    if heads % key_heads:
        raise FormatError(f"{heads} query heads cannot share {key_heads} key heads evenly")
    lanes = next(n for n in (16, 8, 4) if width % (2 * n) == 0)
    entry = _attend(lanes, width // lanes, out_bytes)
    return launch(entry, addresses=7, fixed=(heads, key_heads, most), threads=1, scratch_bytes=4 * (most + LANES))


@intrinsic
def _call(typing, function, argument, threads, parallel):
    """function(argument), through OpenMP's GOMP_parallel on more than one thread."""

    def gen(ctx, b, sig, args):
        from llvmlite import ir

        function, argument, threads, parallel = args
        pointer = _I8.as_pointer()
        one = ir.FunctionType(ir.VoidType(), [pointer])
        all_of_them = ir.FunctionType(ir.VoidType(), [pointer, pointer, _I32, _I32])
        alone = b.icmp_signed("<=", threads, ir.Constant(threads.type, 1))
        with b.if_else(alone) as (then, otherwise):
            with then:
                b.call(b.inttoptr(function, one.as_pointer()), [b.inttoptr(argument, pointer)])
            with otherwise:
                crew = b.trunc(threads, _I32)
                where = [b.inttoptr(function, pointer), b.inttoptr(argument, pointer)]
                b.call(b.inttoptr(parallel, all_of_them.as_pointer()), [*where, crew, ir.Constant(_I32, 0)])
        return ctx.get_dummy_value()

    return types.void(*[_int] * 4), gen


@intrinsic
def _put_i64(typing, address, value):
    def gen(ctx, b, sig, args):
        _store(b, args[1], args[0], 8)
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@functools.cache
def _chain() -> Entry:
    """Runs kernels one after the other: rows of (function, arguments, threads)."""

    def chain_kernel(pointer):
        args = address_of(pointer)
        row = get(args)
        for _ in range(get(args + 8)):
            block = get(row + 8)
            _put_i64(block + SLOT, 0)
            _put_i64(block + NEXT, 0)
            _call(get(row), block, get(row + 16), get(args + 16))
            row += 24

    return Entry(compile_kernel(chain_kernel, "chain of kernels"))


@dataclass(frozen=True)
class Chain:
    """Kernels and their arguments, laid out once, that run one after the other in one call. For one caller at a time.

    Args:
        memory: argument blocks, rows of the programme and scratch memory, kept alive.
        head: address of the chain's own arguments.
        calls: how many kernels.
    """

    memory: tuple[Tensor, ...]
    head: int
    calls: int

    @classmethod
    def of(cls, calls: list[tuple[Launch, tuple[int, ...]]]) -> Chain:
        """Lay out kernels with their addresses."""
        parallel = gomp_parallel()
        at = ctypes.cast(parallel, ctypes.c_void_p).value if parallel else 0
        scratch = torch.empty(max(one.scratch_bytes for one, _ in calls) // 4 + 32, dtype=torch.float32)
        scratch_at = -(-scratch.data_ptr() // 64) * 64
        blocks = torch.zeros(len(calls), 64, dtype=torch.int64)
        rows = torch.zeros(len(calls), 3, dtype=torch.int64)
        for number, (one, addresses) in enumerate(calls):
            packed = one.block.pack(0, 0, scratch_at, *addresses, one.fixed)
            block = torch.frombuffer(bytearray(packed), dtype=torch.int64)
            blocks[number, : block.numel()] = block
            threads = one.threads if at else 1
            rows[number] = torch.tensor([one.entry.address, blocks[number].data_ptr(), threads])
        head = torch.tensor([rows.data_ptr(), len(calls), at or 0], dtype=torch.int64)
        return cls((scratch, blocks, rows, head), head.data_ptr(), len(calls))

    def run(self) -> None:
        """Run them all."""
        _chain().run(self.head, 1)
