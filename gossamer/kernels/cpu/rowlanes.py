"""The vector instructions of the sparse x sparse product, as Numba intrinsics on plain 64-bit addresses.

A sum of products is kept in a dense row of accumulators. Minus zero means "no term yet": products are added to plus
zero before they are summed, so that no sum of one term or more is ever minus zero, and no flag is needed beside it.
Vectors are sixteen entries wide on every processor; LLVM splits them where registers are narrower.
"""

from __future__ import annotations

import sys

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.lanes import _at, _declare, _lane_mask, _load, _Loop, _n, _splat, _store
from gossamer.kernels.cpu.target import lanes

# Columns that are harvested together, and that share one mark.
BLOCK = 16
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_COLUMNS, _MASK = ir.VectorType(_I32, BLOCK), ir.VectorType(_I1, BLOCK)
_int = types.int64


def _float(size: int):
    return ir.FloatType() if size == 4 else ir.DoubleType()


def _suffix(size: int) -> str:
    return f"v{BLOCK}f{8 * size}"


def _masked(b, address, kind, suffix: str, mask):
    """The lanes of a vector that the mask sets, the rest zero; memory behind the others is not touched."""
    pointer = kind.as_pointer()
    function = _declare(b, f"llvm.masked.load.{suffix}.p0", kind, pointer, _I32, _MASK, kind)
    return b.call(function, [_at(b, address, kind), ir.Constant(_I32, 4), mask, ir.Constant(kind, None)])


def _append(b, value, mask, address) -> None:
    """Store the lanes that the mask sets, moved together; up to fifteen lanes beyond them are written too.

    Only vectors of one register are compressed as such: LLVM splits wider ones through a stack slot that it may
    misalign. Elsewhere each lane is stored where the next one belongs, without a branch.
    """
    kind = value.type.element
    size = 8 if isinstance(kind, ir.DoubleType) else 4
    if lanes() < BLOCK:
        for lane in range(BLOCK):
            _store(b, b.extract_element(value, ir.Constant(_I32, lane)), address, size)
            kept = b.zext(b.extract_element(mask, ir.Constant(_I32, lane)), _I64)
            address = b.add(address, b.mul(kept, _n(size)))
        return
    width = 64 // size
    name = f"llvm.experimental.vector.compress.v{width}{'i' if isinstance(kind, ir.IntType) else 'f'}{8 * size}"
    for first in range(0, BLOCK, width):
        numbers = ir.Constant(ir.VectorType(_I32, width), list(range(first, first + width)))
        part, set_lanes = (b.shuffle_vector(x, x, numbers) for x in (value, mask))
        function = _declare(b, name, part.type, part.type, set_lanes.type, part.type)
        _store(b, b.call(function, [part, set_lanes, ir.Constant(part.type, ir.Undefined)]), address, size)
        address = b.add(address, b.mul(_ones(b, set_lanes, width), _n(size)))


def _ones(b, mask, width: int):
    """How many lanes of a mask are set."""
    kind = ir.IntType(width)
    count = b.call(_declare(b, f"llvm.ctpop.i{width}", kind, kind), [b.bitcast(mask, kind)])
    return b.zext(count, _I64)


@intrinsic
def set_int(typing, address, value):
    """Store an int64."""

    def gen(ctx, b, sig, args):
        _store(b, args[1], args[0], 8)
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@intrinsic
def set_i32(typing, address, value):
    """Store the low half of an int64."""

    def gen(ctx, b, sig, args):
        _store(b, b.trunc(args[1], _I32), args[0], 4)
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@intrinsic(prefer_literal=True)
def move(typing, size, source, target):
    """target[0] = source[0]."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        _store(b, _load(b, args[1], _float(S), S), args[2], S)
        return ctx.get_dummy_value()

    return types.void(size, _int, _int), gen


@intrinsic(prefer_literal=True)
def move_add(typing, size, source, target):
    """target[0] += source[0]."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        total = b.fadd(_load(b, args[2], _float(S), S), _load(b, args[1], _float(S), S))
        _store(b, total, args[2], S)
        return ctx.get_dummy_value()

    return types.void(size, _int, _int), gen


@intrinsic
def published(typing, address):
    """The int64 at an address that another thread may write: what it wrote before is seen from here on."""

    def gen(ctx, b, sig, args):
        return b.load_atomic(_at(b, args[0], _I64), "acquire", 8)

    return _int(_int), gen


@intrinsic
def publish(typing, address, value):
    """Store an int64 that other threads wait for."""

    def gen(ctx, b, sig, args):
        b.store_atomic(args[1], _at(b, args[0], _I64), "release", 8)
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@intrinsic
def give_way(typing):
    """Let another thread run, where the system has a call for it."""

    def gen(ctx, b, sig, args):
        if sys.platform != "win32":
            b.call(_declare(b, "sched_yield", _I32), [])
        return ctx.get_dummy_value()

    return types.void(), gen


@intrinsic
def copy_bytes(typing, source, target, count):
    """Copy bytes between places that do not overlap."""

    def gen(ctx, b, sig, args):
        pointer = _I8.as_pointer()
        copy = _declare(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), pointer, pointer, _I64, _I1)
        b.call(copy, [_at(b, args[1], _I8), _at(b, args[0], _I8), args[2], ir.Constant(_I1, 0)])
        return ctx.get_dummy_value()

    return types.void(_int, _int, _int), gen


@intrinsic
def fill_bytes(typing, target, count):
    """Set bytes to zero."""

    def gen(ctx, b, sig, args):
        fill = _declare(b, "llvm.memset.p0.i64", ir.VoidType(), _I8.as_pointer(), _I8, _I64, _I1)
        b.call(fill, [_at(b, args[0], _I8), ir.Constant(_I8, 0), args[1], ir.Constant(_I1, 0)])
        return ctx.get_dummy_value()

    return types.void(_int, _int), gen


@intrinsic(prefer_literal=True)
def forget(typing, size, target, blocks):
    """Set blocks of accumulators to "no term yet"."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        nothing = ir.Constant(ir.VectorType(_float(S), BLOCK), [-0.0] * BLOCK)
        loop = _Loop(b, _n(0), args[2], 1, [])
        _store(b, nothing, b.add(args[1], b.mul(loop.i, _n(S * BLOCK))), S)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(size, _int, _int), gen


@intrinsic(prefer_literal=True)
def scale_row(typing, size, weight, columns, values, count, to_columns, to_values):
    """Append weight[0] * values[:count] and their columns to a list; up to fifteen entries beyond are written too."""
    S = size.literal_value
    kind = ir.VectorType(_float(S), BLOCK)

    def gen(ctx, b, sig, args):
        _, weight, columns, values, count, to_columns, to_values = args
        factor = _splat(b, _load(b, weight, _float(S), S), BLOCK)
        loop = _Loop(b, _n(0), b.add(count, _n(BLOCK - 1)), BLOCK, [])
        mask = _lane_mask(b, b.sub(count, loop.i), BLOCK)
        i, v = b.mul(loop.i, _n(4)), b.mul(loop.i, _n(S))
        _store(b, _masked(b, b.add(columns, i), _COLUMNS, f"v{BLOCK}i32", mask), b.add(to_columns, i), 4)
        product = b.fmul(factor, _masked(b, b.add(values, v), kind, _suffix(S), mask))
        _store(b, b.fadd(product, ir.Constant(kind, None)), b.add(to_values, v), S)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(size, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def scatter_add(typing, size, levels, columns, values, count, sums, marks, far_marks):
    """sums[columns[e]] += values[e], one after the other, since columns repeat.

    With one level every touched block gets a mark; with two, every 64 blocks get one more.
    """
    S, L = size.literal_value, levels.literal_value

    def gen(ctx, b, sig, args):
        columns, values, count, sums, marks, far_marks = args[2:]

        def entry(e):
            column = b.zext(_load(b, b.add(columns, b.mul(e, _n(4))), _I32, 4), _I64)
            value = _load(b, b.add(values, b.mul(e, _n(S))), _float(S), S)
            place = b.add(sums, b.mul(column, _n(S)))
            _store(b, b.fadd(_load(b, place, _float(S), S), value), place, S)
            one = ir.Constant(_I8, 1)
            if L > 0:
                _store(b, one, b.add(marks, b.lshr(column, _n(4))), 1)
            if L > 1:
                _store(b, one, b.add(far_marks, b.lshr(column, _n(10))), 1)

        loop = _Loop(b, _n(0), count, 4, [])
        for u in range(4):
            entry(b.add(loop.i, _n(u)))
        loop.close([])
        rest = _Loop(b, loop.i, count, 1, [])
        entry(rest.i)
        rest.close([])
        return ctx.get_dummy_value()

    return types.void(size, levels, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def scatter_row(typing, size, weight, columns, values, count, sums, marks):
    """sums[columns[e]] += weight[0] * values[e], with marks: for rows too short to be worth listing."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        _, weight, columns, values, count, sums, marks = args
        factor = _load(b, weight, _float(S), S)
        loop = _Loop(b, _n(0), count, 1, [])
        column = b.zext(_load(b, b.add(columns, b.mul(loop.i, _n(4))), _I32, 4), _I64)
        product = b.fmul(factor, _load(b, b.add(values, b.mul(loop.i, _n(S))), _float(S), S))
        term = b.fadd(product, ir.Constant(_float(S), 0.0))
        place = b.add(sums, b.mul(column, _n(S)))
        _store(b, b.fadd(_load(b, place, _float(S), S), term), place, S)
        _store(b, ir.Constant(_I8, 1), b.add(marks, b.lshr(column, _n(4))), 1)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(size, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def scatter_slots(typing, size, columns, values, count, slots, sums):
    """sums[slots[columns[e]]] += values[e]. Slot zero means "not wanted": such terms go to the first sixteen sums in
    turn, so that they wait neither for a branch nor for each other."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        _, columns, values, count, slots, sums = args
        loop = _Loop(b, _n(0), count, 1, [])
        e = loop.i
        column = b.zext(_load(b, b.add(columns, b.mul(e, _n(4))), _I32, 4), _I64)
        slot = b.zext(_load(b, b.add(slots, b.mul(column, _n(4))), _I32, 4), _I64)
        spare = b.and_(e, _n(BLOCK - 1))
        slot = b.select(b.icmp_signed(">", slot, spare), slot, spare)
        place = b.add(sums, b.mul(slot, _n(S)))
        value = _load(b, b.add(values, b.mul(e, _n(S))), _float(S), S)
        _store(b, b.fadd(_load(b, place, _float(S), S), value), place, S)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(size, *[_int] * 5), gen


@intrinsic(prefer_literal=True)
def collect(typing, size, columns, count, sums, values):
    """values[e] = sums[columns[e]], which are forgotten; zero where there was no term."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        _, columns, count, sums, values = args
        loop = _Loop(b, _n(0), count, 1, [])
        column = b.zext(_load(b, b.add(columns, b.mul(loop.i, _n(4))), _I32, 4), _I64)
        place = b.add(sums, b.mul(column, _n(S)))
        total = b.fadd(_load(b, place, _float(S), S), ir.Constant(_float(S), 0.0))
        _store(b, total, b.add(values, b.mul(loop.i, _n(S))), S)
        _store(b, ir.Constant(_float(S), -0.0), place, S)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(size, *[_int] * 4), gen


@intrinsic
def take_marks(typing, address):
    """A bit for each of 64 marks that is set; the marks are cleared."""

    def gen(ctx, b, sig, args):
        kind = ir.VectorType(_I8, 64)
        marks = _load(b, args[0], kind, 1)
        _store(b, ir.Constant(kind, None), args[0], 1)
        return b.bitcast(b.icmp_unsigned("!=", marks, ir.Constant(kind, None)), _I64)

    return _int(_int), gen


@intrinsic
def lowest_bit(typing, bits):
    """The number of the lowest set bit."""

    def gen(ctx, b, sig, args):
        return b.call(_declare(b, "llvm.cttz.i64", _I64, _I64, _I1), [args[0], ir.Constant(_I1, 1)])

    return _int(_int), gen


def _keep_touched(b, size: int, place, numbers, to_columns, to_values):
    """Append numbers and sums of a block's touched entries to a list and forget the block; returns how many."""
    kind, bits = ir.VectorType(_float(size), BLOCK), ir.VectorType(ir.IntType(8 * size), BLOCK)
    block = _load(b, place, kind, size)
    _store(b, ir.Constant(kind, [-0.0] * BLOCK), place, size)
    minus_zero = ir.Constant(bits, [1 << (8 * size - 1)] * BLOCK)
    mask = b.icmp_unsigned("!=", b.bitcast(block, bits), minus_zero)
    _append(b, numbers, mask, to_columns)
    _append(b, block, mask, to_values)
    return _ones(b, mask, BLOCK)


@intrinsic(prefer_literal=True)
def harvest_listed(typing, size, sums, columns, count, to_columns, to_values):
    """Append those of at most sixteen listed columns whose sums were touched, and the sums; returns how many."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        _, sums, columns, count, to_columns, to_values = args
        numbers = _masked(b, columns, _COLUMNS, f"v{BLOCK}i32", _lane_mask(b, count, BLOCK))
        return _keep_touched(b, S, sums, numbers, to_columns, to_values)

    return _int(size, *[_int] * 5), gen


@intrinsic(prefer_literal=True)
def merge_entry(typing, size, columns, values, x, y, to_column, to_value):
    """Copy the lower of entries x and y, or their sum where they share a column; returns 1 (x), 2 (y) or 3 (both)."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        _, columns, values, x, y, to_column, to_value = args
        kind, nothing = _float(S), ir.Constant(_float(S), -0.0)
        column_x, column_y = (_load(b, b.add(columns, b.mul(e, _n(4))), _I32, 4) for e in (x, y))
        value_x, value_y = (_load(b, b.add(values, b.mul(e, _n(S))), kind, S) for e in (x, y))
        take_x, take_y = b.icmp_signed("<=", column_x, column_y), b.icmp_signed("<=", column_y, column_x)
        _store(b, b.select(take_x, column_x, column_y), to_column, 4)
        _store(b, b.fadd(b.select(take_x, value_x, nothing), b.select(take_y, value_y, nothing)), to_value, S)
        return b.add(b.zext(take_x, _I64), b.shl(b.zext(take_y, _I64), _n(1)))

    return _int(size, *[_int] * 6), gen


@intrinsic(prefer_literal=True)
def harvest(typing, size, sums, column, to_columns, to_values):
    """Append the touched columns of one block, and their sums, in order, and forget them; returns how many."""
    S = size.literal_value

    def gen(ctx, b, sig, args):
        _, sums, column, to_columns, to_values = args
        numbers = b.add(ir.Constant(_COLUMNS, list(range(BLOCK))), _splat(b, b.trunc(column, _I32), BLOCK))
        return _keep_touched(b, S, b.add(sums, b.mul(column, _n(S))), numbers, to_columns, to_values)

    return _int(size, *[_int] * 4), gen


@intrinsic
def falls(typing, columns, count):
    """How many of the entries 0..count of a list are not above the one before."""

    def gen(ctx, b, sig, args):
        columns, count = args
        loop = _Loop(b, _n(0), count, BLOCK, [ir.Constant(_COLUMNS, None)])
        at = b.add(columns, b.mul(loop.i, _n(4)))
        now, before = _load(b, at, _COLUMNS, 4), _load(b, b.sub(at, _n(4)), _COLUMNS, 4)
        (found,) = loop.close([b.add(loop.values[0], b.zext(b.icmp_signed("<=", now, before), _COLUMNS))])
        total = b.call(_declare(b, f"llvm.vector.reduce.add.v{BLOCK}i32", _I32, _COLUMNS), [found])
        rest = _Loop(b, loop.i, count, 1, [b.zext(total, _I64)])
        at = b.add(columns, b.mul(rest.i, _n(4)))
        fell = b.icmp_signed("<=", _load(b, at, _I32, 4), _load(b, b.sub(at, _n(4)), _I32, 4))
        (total,) = rest.close([b.add(rest.values[0], b.zext(fell, _I64))])
        return total

    return _int(_int, _int), gen


@intrinsic
def beyond(typing, columns, count, width):
    """How many columns of a list are not in 0..width."""

    def gen(ctx, b, sig, args):
        columns, count, width = args
        limit = b.trunc(width, _I32)
        loop = _Loop(b, _n(0), count, BLOCK, [ir.Constant(_COLUMNS, None)])
        now = _load(b, b.add(columns, b.mul(loop.i, _n(4))), _COLUMNS, 4)
        out = b.zext(b.icmp_unsigned(">=", now, _splat(b, limit, BLOCK)), _COLUMNS)
        (found,) = loop.close([b.add(loop.values[0], out)])
        total = b.call(_declare(b, f"llvm.vector.reduce.add.v{BLOCK}i32", _I32, _COLUMNS), [found])
        rest = _Loop(b, loop.i, count, 1, [b.zext(total, _I64)])
        now = _load(b, b.add(columns, b.mul(rest.i, _n(4))), _I32, 4)
        (total,) = rest.close([b.add(rest.values[0], b.zext(b.icmp_unsigned(">=", now, limit), _I64))])
        return total

    return _int(_int, _int, _int), gen


@intrinsic(prefer_literal=True)
def rank_row(typing, size, columns, values, count, to_columns, to_values):
    """Sort at most sixteen entries by column and add those that share one; returns how many columns there are.

    An entry's place is the number of distinct columns below its own: a comparison with all sixteen and a count of bits.
    """
    S = size.literal_value
    kind = ir.VectorType(_float(S), BLOCK)

    def gen(ctx, b, sig, args):
        _, columns, values, count, to_columns, to_values = args
        inside = _lane_mask(b, count, BLOCK)
        last = ir.Constant(_COLUMNS, [2**31 - 1] * BLOCK)
        keys = b.select(inside, _load(b, columns, _COLUMNS, 4), last)
        _store(b, ir.Constant(kind, None), to_values, S)

        def key(e):
            return _load(b, b.add(columns, b.mul(e, _n(4))), _I32, 4)

        loop = _Loop(b, _n(0), count, 1, [ir.Constant(_I16, 0)])
        same = b.bitcast(b.icmp_signed("==", keys, _splat(b, key(loop.i), BLOCK)), _I16)
        (firsts,) = loop.close([b.or_(loop.values[0], b.and_(same, b.neg(same)))])
        distinct = b.bitcast(firsts, _MASK)
        loop = _Loop(b, _n(0), count, 1, [])
        column = key(loop.i)
        place = _ones(b, b.and_(b.icmp_signed("<", keys, _splat(b, column, BLOCK)), distinct), BLOCK)
        value = _load(b, b.add(values, b.mul(loop.i, _n(S))), _float(S), S)
        _store(b, column, b.add(to_columns, b.mul(place, _n(4))), 4)
        target = b.add(to_values, b.mul(place, _n(S)))
        _store(b, b.fadd(_load(b, target, _float(S), S), value), target, S)
        loop.close([])
        return _ones(b, distinct, BLOCK)

    return _int(size, *[_int] * 5), gen
