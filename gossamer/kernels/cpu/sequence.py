"""A whole list of kernel calls as one: every thread walks the list, and they wait for each other between steps.

A network of many small layers spends more time waking threads and calling kernels than computing. Here the threads are
woken once; between two steps they meet at a counter in memory, which takes well under a microsecond.
"""

from __future__ import annotations

import ctypes
import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.cache import compile_kernel
from gossamer.kernels.cpu.lanes import address_of, get, take
from gossamer.kernels.cpu.launch import ADDRESSES, NEXT, SLOT
from gossamer.kernels.cpu.threads import Entry

# A step of the list: where its kernel and its argument block lie, and how many threads share it.
STEP_BYTES = 24
TABLE, STEPS, TEAM, ARRIVED, BEGIN, YIELD = range(ADDRESSES, ADDRESSES + 48, 8)
# Looks at the counter before a waiting thread gives its core away: about ten microseconds.
PATIENCE = 4000

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_int = types.int64


@intrinsic
def call_at(typing, function, argument):
    """Call the C function at an address with one pointer."""

    def gen(ctx, b, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer()])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [b.inttoptr(args[1], _I8.as_pointer())])
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@intrinsic
def look(typing, address):
    """The int64 at an address as other threads have left it."""

    def gen(ctx, b, sig, args):
        return b.load_atomic(b.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return _int(_int), gen


@intrinsic
def put(typing, address, value):
    """Write an int64."""

    def gen(ctx, b, sig, args):
        b.store(args[1], b.inttoptr(args[0], _I64.as_pointer())).align = 8
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@intrinsic
def ask(typing, function):
    """The int32 that the C function without arguments at an address returns."""

    def gen(ctx, b, sig, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        return b.sext(b.call(b.inttoptr(args[0], kind.as_pointer()), []), _I64)

    return _int(_int), gen


@functools.cache
def kernel() -> Entry:
    """The compiled walk through a list of steps."""

    def sequence_kernel(pointer):
        args = address_of(pointer)
        me, arrived = take(args + SLOT), get(args + ARRIVED)
        # Fewer threads may have come than were asked for: those who wait must know for how many.
        threads = ask(get(args + TEAM)) if get(args + TEAM) else 1
        table, steps, met = get(args + TABLE), get(args + STEPS), get(args + BEGIN)
        for i in range(steps):
            step = table + STEP_BYTES * i
            if me < get(step + 16):
                call_at(get(step), get(step + 8))
            if threads > 1:
                met += threads
                take(arrived)
                looks = 0
                while look(arrived) < met:
                    looks += 1
                    if looks > PATIENCE:
                        ask(get(args + YIELD))
            if me == 0:
                # Everybody is through: the counters of this step's block are ready for the next run.
                put(get(step + 8) + SLOT, 0)
                put(get(step + 8) + NEXT, 0)

    return Entry(compile_kernel(sequence_kernel, "sequence of kernels"))


@functools.cache
def yield_at() -> int:
    """Address of the C library's sched_yield."""
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
