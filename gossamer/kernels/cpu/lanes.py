"""The vector instructions that kernels are made of, as Numba intrinsics on plain 64-bit addresses.

Everything that decides code (rows of a tile, vectors, lanes) is a literal int; everything else is a run-time int64.
Vectors never cross Numba's type system: each intrinsic loads, computes and stores inside itself.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu import activations
from gossamer.kernels.cpu.activations import Vector

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_int = types.int64


def _n(x: int):
    return ir.Constant(_I64, x)


def _at(b, address, kind):
    return b.inttoptr(address, kind.as_pointer())


def _load(b, address, kind, align: int):
    value = b.load(_at(b, address, kind))
    value.align = align
    return value


def _store(b, value, address, align: int):
    b.store(value, _at(b, address, value.type)).align = align


def _splat(b, scalar, lanes: int):
    if lanes == 1:
        one = ir.Constant(ir.VectorType(scalar.type, 1), ir.Undefined)
        return b.insert_element(one, scalar, ir.Constant(_I32, 0))
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _declare(b, name: str, result, *args):
    return b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, list(args)), name)


def _lane_mask(b, count, lanes: int):
    """Mask whose first `count` lanes are set."""
    numbers = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
    return b.icmp_signed("<", numbers, _splat(b, b.trunc(count, _I32), lanes))


def _masked_load(b, address, mask, lanes: int):
    kind = ir.VectorType(_F32, lanes)
    pointer = kind.as_pointer()
    name = f"llvm.masked.load.v{lanes}f32.p0"
    function = _declare(b, name, kind, pointer, _I32, ir.VectorType(_I1, lanes), kind)
    return b.call(function, [b.inttoptr(address, pointer), ir.Constant(_I32, 4), mask, ir.Constant(kind, None)])


def _masked_store(b, value, address, mask, lanes: int):
    kind = ir.VectorType(_F32, lanes)
    pointer = kind.as_pointer()
    name = f"llvm.masked.store.v{lanes}f32.p0"
    function = _declare(b, name, ir.VoidType(), kind, pointer, _I32, ir.VectorType(_I1, lanes))
    b.call(function, [value, b.inttoptr(address, pointer), ir.Constant(_I32, 4), mask])


@intrinsic
def get(typing, address):
    """The int64 stored at an address."""
    return _int(_int), lambda ctx, b, sig, args: _load(b, args[0], _I64, 8)


@intrinsic
def get_i32(typing, address):
    """The int32 stored at an address, widened."""
    return _int(_int), lambda ctx, b, sig, args: b.sext(_load(b, args[0], _I32, 4), _I64)


@intrinsic
def address_of(typing, pointer):
    """The integer value of the kernel's void* argument."""
    return _int(types.voidptr), lambda ctx, b, sig, args: b.ptrtoint(args[0], _I64)


@intrinsic
def take(typing, address):
    """Atomically add one to a counter and return what it was."""

    def gen(ctx, b, sig, args):
        return b.atomic_rmw("add", _at(b, args[0], _I64), _n(1), "acq_rel")

    return _int(_int), gen


@intrinsic
def take_many(typing, address, amount):
    """Atomically add an amount to a counter and return what it was."""

    def gen(ctx, b, sig, args):
        return b.atomic_rmw("add", _at(b, args[0], _I64), args[1], "acq_rel")

    return _int(_int, _int), gen


@intrinsic
def prefetch(typing, address):
    """Ask for the cache line at an address; any address is allowed."""

    def gen(ctx, b, sig, args):
        ask = _declare(b, "llvm.prefetch.p0", ir.VoidType(), _I8.as_pointer(), _I32, _I32, _I32)
        b.call(ask, [_at(b, args[0], _I8), *(ir.Constant(_I32, n) for n in (0, 3, 1))])
        return ctx.get_dummy_value()

    return types.void(_int), gen


@intrinsic
def thread_number(typing, function):
    """What the `int function(void)` at an address returns; 0 when there is none."""

    def gen(ctx, b, sig, args):
        before = b.block
        with b.if_then(b.icmp_signed("!=", args[0], _n(0))):
            asked = b.block
            found = b.call(b.inttoptr(args[0], ir.FunctionType(_I32, []).as_pointer()), [])
        number = b.phi(_I32)
        number.add_incoming(ir.Constant(_I32, 0), before)
        number.add_incoming(found, asked)
        return b.sext(number, _I64)

    return _int(_int), gen


class _Loop:
    """`for i in range(start, stop, step)` in IR, carrying values from turn to turn."""

    def __init__(self, b, start, stop, step: int, carried):
        self.b, self.step = b, step
        before = b.block
        self.head, self.body, self.after = (b.append_basic_block(n) for n in ("loop", "loop.body", "loop.end"))
        b.branch(self.head)
        b.position_at_end(self.head)
        self.i = b.phi(_I64)
        self.i.add_incoming(start, before)
        self.values = [b.phi(value.type) for value in carried]
        for phi, value in zip(self.values, carried):
            phi.add_incoming(value, before)
        last = b.add(self.i, _n(step - 1))
        b.cbranch(b.icmp_signed("<", last, stop), self.body, self.after)
        b.position_at_end(self.body)

    def close(self, carried) -> list:
        """End the body; the values after the loop are the phis."""
        b = self.b
        self.i.add_incoming(b.add(self.i, _n(self.step)), b.block)
        for phi, value in zip(self.values, carried):
            phi.add_incoming(value, b.block)
        b.branch(self.head)
        b.position_at_end(self.after)
        return self.values


def _start_sums(b, first, kind, addresses):
    """Sums start at zero in the first block of columns, and where the last block left them otherwise."""
    before = b.block
    resume, ready = b.append_basic_block("resume"), b.append_basic_block("ready")
    b.cbranch(b.icmp_signed("!=", first, _n(0)), ready, resume)
    b.position_at_end(resume)
    loaded = [_load(b, address, kind, 4) for address in addresses]
    b.branch(ready)
    b.position_at_end(ready)
    sums = []
    for value in loaded:
        phi = b.phi(kind)
        phi.add_incoming(ir.Constant(kind, None), before)
        phi.add_incoming(value, resume)
        sums.append(phi)
    return sums


@intrinsic(prefer_literal=True)
def tile(typing, rows, vectors, lanes, index_bytes, first, stop, start, index, value, panel, unit, sums, sums_row):
    """Add entries start..stop of one row group into its sums: a register tile of rows x vectors.

    sums[r, :] += sum over entries e of value[e, r] * panel[index[e] * unit, :].
    `first` non-zero starts from zero instead of reading the sums. `unit` and `sums_row` are in bytes.
    """
    G, V, L, B = (t.literal_value for t in (rows, vectors, lanes, index_bytes))
    # Enough independent chains of additions to cover a four-cycle latency at two additions per cycle.
    chains = max(1, min(4, 8 // (G * V)))
    unroll = max(chains, 2 if G * V <= 8 else 1)
    kind = ir.VectorType(_F32, L)

    def gen(ctx, b, sig, args):
        first, stop, start, index, value, panel, unit, sums, sums_row = args[4:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        places = []
        for r in range(G):
            row = b.add(sums, b.mul(sums_row, _n(r)))
            places += [b.add(row, _n(4 * L * v)) for v in range(V)]

        def entry(e, acc):
            raw = _load(b, b.add(index, b.mul(e, _n(B))), ir.IntType(8 * B), B)
            column = b.zext(raw, _I64) if B < 8 else raw
            x = b.add(panel, b.mul(column, unit))
            xs = [_load(b, b.add(x, _n(4 * L * v)), kind, 4) for v in range(V)]
            w = b.add(value, b.mul(e, _n(4 * G)))
            acc = list(acc)
            for r in range(G):
                weight = _splat(b, _load(b, b.add(w, _n(4 * r)), _F32, 4), L)
                for v in range(V):
                    acc[r * V + v] = b.call(fma, [weight, xs[v], acc[r * V + v]])
            return acc

        acc = _start_sums(b, first, kind, places)
        size = G * V
        acc = acc + [ir.Constant(kind, None)] * (size * (chains - 1))
        if unroll > 1:
            loop = _Loop(b, start, stop, unroll, acc)
            now = list(loop.values)
            for u in range(unroll):
                c = (u % chains) * size
                now[c : c + size] = entry(b.add(loop.i, _n(u)), now[c : c + size])
            acc = loop.close(now)
            start = loop.i
        loop = _Loop(b, start, stop, 1, acc)
        acc = loop.close(entry(loop.i, loop.values[:size]) + loop.values[size:])
        for c in range(1, chains):
            acc = [b.fadd(acc[k], acc[c * size + k]) for k in range(size)] + acc[size:]
        for value_, place in zip(acc[:size], places):
            _store(b, value_, place, 4)
        return ctx.get_dummy_value()

    return types.void(rows, vectors, lanes, index_bytes, *[_int] * 9), gen


def _transposed(b, rows, lanes: int):
    """Transpose lanes x lanes floats held in `lanes` vectors, by unpacking pairs and then swapping 128-bit quarters."""

    def shuffle(x, y, pattern):
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, lanes), pattern))

    quarters = range(0, lanes, 4)
    low = [p for q in quarters for p in (q, lanes + q, q + 1, lanes + q + 1)]
    high = [p + 2 for p in low]
    pair_low = [p for q in quarters for p in (q, q + 1, lanes + q, lanes + q + 1)]
    pair_high = [p + 2 for p in pair_low]
    fours = []
    for q in quarters:
        a, c, d, e = rows[q : q + 4]
        ac_low, ac_high = shuffle(a, c, low), shuffle(a, c, high)
        de_low, de_high = shuffle(d, e, low), shuffle(d, e, high)
        fours.append(
            [
                shuffle(ac_low, de_low, pair_low),
                shuffle(ac_low, de_low, pair_high),
                shuffle(ac_high, de_high, pair_low),
                shuffle(ac_high, de_high, pair_high),
            ]
        )
    even = [4 * k + j for k in range(0, 2 * len(quarters), 2) for j in range(4)]
    odd = [4 * k + j for k in range(1, 2 * len(quarters), 2) for j in range(4)]
    out = [None] * lanes
    for j in range(4):
        blocks = {0: [four[j] for four in fours]}
        step = 1
        # Halve the number of vectors per step; the key is the 128-bit quarter (a column block) they hold.
        while len(blocks) < len(quarters):
            blocks = {
                key + offset * step: [shuffle(x, y, pattern) for x, y in zip(vs[::2], vs[1::2])]
                for key, vs in blocks.items()
                for offset, pattern in ((0, even), (1, odd))
            }
            step *= 2
        for key, (vector,) in blocks.items():
            out[4 * key + j] = vector
    return out


@intrinsic(prefer_literal=True)
def transpose(typing, lanes, ragged, finish, source, source_row, rows, cols, target, target_row, width, add, low):
    """target[c, r] = max(source[r, c] + add[r], low[0]) for a lanes x lanes block; row strides are in bytes.

    Ragged blocks have `rows` x `cols` entries that may be read (the rest count as zero) and write the first `width`
    lanes of `cols` rows. Without `finish` nothing is added and there is no lower bound.
    """
    L, masked, finishing = lanes.literal_value, ragged.literal_value, finish.literal_value

    def gen(ctx, b, sig, args):
        source, source_row, rows, cols, target, target_row, width, add, low = args[3:]
        kind = ir.VectorType(_F32, L)
        bits = ir.VectorType(_I1, L)

        def row_mask(mask, r, count):
            return b.select(b.icmp_signed("<", _n(r), count), mask, ir.Constant(bits, None))

        def row_place(base, stride, r, count):
            # A masked access to an unmapped page costs hundreds of cycles even if no lane is set: stay on real rows.
            row = b.select(b.icmp_signed("<", _n(r), count), _n(r), _n(0)) if masked else _n(r)
            return b.add(base, b.mul(stride, row))

        def source_vector(r):
            place = row_place(source, source_row, r, rows)
            if not masked:
                return _load(b, place, kind, 4)
            return _masked_load(b, place, row_mask(inside, r, rows), L)

        inside = _lane_mask(b, cols, L) if masked else None
        vectors = [source_vector(r) for r in range(L)]
        wanted = _lane_mask(b, width, L) if masked else None
        if finishing:
            bias = _masked_load(b, add, wanted, L) if masked else _load(b, add, kind, 4)
            bound = _splat(b, _load(b, low, _F32, 4), L)
        for c, vector in enumerate(_transposed(b, vectors, L)):
            if finishing:
                vector = b.fadd(vector, bias)
                vector = b.select(b.fcmp_ordered("<", vector, bound), bound, vector)
            place = row_place(target, target_row, c, cols)
            if masked:
                _masked_store(b, vector, place, row_mask(wanted, c, cols), L)
            else:
                _store(b, vector, place, 4)
        return ctx.get_dummy_value()

    return types.void(lanes, ragged, finish, *[_int] * 9), gen


@intrinsic(prefer_literal=True)
def finish_row(typing, lanes, code, spread, source, target, count, bias):
    """target[i] = activation(source[i] + bias[i if spread else 0]) for `count` floats; both may be the same row."""
    L, act, per_lane = lanes.literal_value, code.literal_value, spread.literal_value

    def gen(ctx, b, sig, args):
        source, target, count, bias = args[3:]
        kind = ir.VectorType(_F32, L)
        shift = None if per_lane else _splat(b, _load(b, bias, _F32, 4), L)

        def done(x, shift):
            return activations.emit(Vector(b, L), act, b.fadd(x, shift))

        loop = _Loop(b, _n(0), count, L, [])
        offset = b.mul(loop.i, _n(4))
        add = _load(b, b.add(bias, offset), kind, 4) if per_lane else shift
        _store(b, done(_load(b, b.add(source, offset), kind, 4), add), b.add(target, offset), 4)
        loop.close([])
        rest = b.sub(count, loop.i)
        with b.if_then(b.icmp_signed(">", rest, _n(0))):
            mask, offset = _lane_mask(b, rest, L), b.mul(loop.i, _n(4))
            add = _masked_load(b, b.add(bias, offset), mask, L) if per_lane else shift
            x = _masked_load(b, b.add(source, offset), mask, L)
            _masked_store(b, done(x, add), b.add(target, offset), mask, L)
        return ctx.get_dummy_value()

    return types.void(lanes, code, spread, *[_int] * 4), gen


@intrinsic(prefer_literal=True)
def copy_row(typing, lanes, source, target, count, width):
    """target[:count] = source[:count] and target[count:width] = 0."""
    L = lanes.literal_value

    def gen(ctx, b, sig, args):
        _, source, target, count, width = args
        kind = ir.VectorType(_F32, L)
        loop = _Loop(b, _n(0), count, L, [])
        offset = b.mul(loop.i, _n(4))
        _store(b, _load(b, b.add(source, offset), kind, 4), b.add(target, offset), 4)
        loop.close([])
        rest = _Loop(b, loop.i, b.add(width, _n(L - 1)), L, [])
        offset = b.mul(rest.i, _n(4))
        x = _masked_load(b, b.add(source, offset), _lane_mask(b, b.sub(count, rest.i), L), L)
        _masked_store(b, x, b.add(target, offset), _lane_mask(b, b.sub(width, rest.i), L), L)
        rest.close([])
        return ctx.get_dummy_value()

    return types.void(lanes, *[_int] * 4), gen


def _bf16_to_f32(b, x, lanes: int):
    """A bfloat16 is the upper half of a float32."""
    wide = ir.VectorType(_I32, lanes)
    shift = ir.Constant(wide, [16] * lanes)
    return b.bitcast(b.shl(b.zext(x, wide), shift), ir.VectorType(_F32, lanes))


@intrinsic
def widen_row(typing, source, target, count):
    """target[:count] = float32(source[:count]) for bfloat16 numbers, one at a time: rows are short."""

    def gen(ctx, b, sig, args):
        source, target, count = args
        loop = _Loop(b, _n(0), count, 1, [])
        raw = _load(b, b.add(source, b.mul(loop.i, _n(2))), _I16, 2)
        bits = b.shl(b.zext(raw, _I32), ir.Constant(_I32, 16))
        _store(b, bits, b.add(target, b.mul(loop.i, _n(4))), 4)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(*[_int] * 3), gen


@intrinsic(prefer_literal=True)
def bitmask_rows(typing, rows, tokens, value_bytes, bits, bits_row, offsets, values, x, x_row, words, y, y_row):
    """y[t, r] = sum over kept columns k of weight[r, k] * x[t, k], for a few rows and tokens at once.

    A step takes 16 columns: their mask spreads the next packed values over lanes, and the count of its bits moves on.
    Sixteen values are loaded whatever the mask (the format pads for it) and spread in the register: spreading while
    loading measured slower.
    Columns that are not kept are masked out of the sum too, so an infinity there does not spread.
    """
    R, T, B = rows.literal_value, tokens.literal_value, value_bytes.literal_value
    L = 16
    kind, bits_kind = ir.VectorType(_F32, L), ir.VectorType(_I1, L)
    raw = kind if B == 4 else ir.VectorType(_I16, L)

    def gen(ctx, b, sig, args):
        bits, bits_row, offsets, values, x, x_row, words, y, y_row = args[3:]
        fma = _declare(b, "llvm.fma.v16f32", kind, kind, kind, kind)
        expand = _declare(b, "llvm.x86.avx512.mask.expand.v16f32", kind, kind, kind, bits_kind)
        count = _declare(b, "llvm.ctpop.i64", _I64, _I64)
        total = _declare(b, "llvm.vector.reduce.fadd.v16f32", _F32, _F32, kind)
        places = []
        for r in range(R):
            offset = b.sext(_load(b, b.add(offsets, _n(4 * r)), _I32, 4), _I64)
            places.append(b.add(values, b.mul(offset, _n(B))))
        masks = [b.add(bits, b.mul(bits_row, _n(r))) for r in range(R)]
        loop = _Loop(b, _n(0), words, 1, places + [ir.Constant(kind, None)] * (R * T))
        places, sums = loop.values[:R], list(loop.values[R:])
        at = b.add(x, b.mul(loop.i, _n(4 * L)))
        xs = [_load(b, b.add(at, b.mul(x_row, _n(t))), kind, 4) for t in range(T)]
        moved = []
        for r in range(R):
            word = _load(b, b.add(masks[r], b.mul(loop.i, _n(2))), _I16, 2)
            mask = b.bitcast(word, bits_kind)
            packed = _load(b, places[r], raw, B)
            packed = packed if B == 4 else _bf16_to_f32(b, packed, L)
            w = b.call(expand, [packed, ir.Constant(kind, None), mask])
            for t in range(T):
                old = sums[r * T + t]
                sums[r * T + t] = b.select(mask, b.call(fma, [w, xs[t], old]), old)
            moved.append(b.add(places[r], b.mul(b.call(count, [b.zext(word, _I64)]), _n(B))))
        sums = loop.close(moved + sums)[R:]
        for r in range(R):
            for t in range(T):
                # `reassoc` lets the sixteen lanes be added as a tree.
                scalar = b.call(total, [ir.Constant(_F32, -0.0), sums[r * T + t]], fastmath=("reassoc",))
                _store(b, scalar, b.add(b.add(y, b.mul(y_row, _n(t))), _n(4 * r)), 4)
        return ctx.get_dummy_value()

    return types.void(rows, tokens, value_bytes, *[_int] * 9), gen
