"""Depthwise convolution of one small plane, stride 1, as vector code.

`flat` takes pixels one after the other, for a plane of a few vectors whose size is compiled in. `fold` takes several
lines of a narrow image into one vector.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gossamer.kernels.cpu.depthwise_lanes import at_most, deliver, lane_numbers
from gossamer.kernels.cpu.lanes import _F32, _I1, _declare, _int, _lane_mask, _load, _Loop, _masked_load, _n, _splat


@intrinsic(prefer_literal=True)
def flat(
    typing, kernel, high, wide, out_high, top, left, lanes, add,
    x, y, w, bias, residual, begin, end, low, up,
):  # fmt: skip
    """Vectors begin..end - 1 of the output of one small plane, stride 1, output lines as wide as the input's.

    Pixels follow each other, so that a tap is the plane moved by a fixed number of them: aligned vectors are moved by
    lanes. Taps to the left (right) must not see the last (first) columns: those load them as zeros.
    """
    K, H, W, OH, top_, left_, L, adding = (
        t.literal_value for t in (kernel, high, wide, out_high, top, left, lanes, add)
    )
    kind, bits = ir.VectorType(_F32, L), ir.VectorType(_I1, L)

    def real(vector: int, shift: int) -> list[bool]:
        """Which pixels of an input vector a tap `shift` columns aside may see."""
        pixels = range(vector * L, (vector + 1) * L)
        return [0 <= p < H * W and 0 <= p % W - shift < W for p in pixels]

    def gen(ctx, b, sig, args):
        x, y, w, bias, residual, begin, end, low, up = args[8:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        weights = [[_splat(b, _load(b, b.add(w, _n(4 * (K * i + j))), _F32, 4), L) for j in range(K)] for i in range(K)]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, zero = _splat(b, _load(b, bias, _F32, 4), L), ir.Constant(kind, None)

        def loaded(vector, shift):
            seen = real(vector, shift)
            if not any(seen):
                return None
            at = b.add(x, _n(4 * L * vector))
            return _load(b, at, kind, 4) if all(seen) else _masked_load(b, at, ir.Constant(bits, seen), L)

        for number in range(-(-OH * W // L)):
            here = b.and_(b.icmp_signed("<=", begin, _n(number)), b.icmp_signed("<", _n(number), end))
            with b.if_then(here, likely=True):
                sums, taken = [start, zero, zero], {}
                for i in range(K):
                    for j in range(K):
                        shift = j - left_
                        vector, lane = divmod(number * L + (i - top_) * W + shift, L)
                        for needed in range(vector, vector + (2 if lane else 1)):
                            if (needed, shift) not in taken:
                                taken[needed, shift] = loaded(needed, shift)
                        both = [taken.get((n, shift)) for n in (vector, vector + 1)]
                        if both[0] is None and (not lane or both[1] is None):
                            continue
                        pixels = both[0]
                        if lane:
                            pixels = b.shuffle_vector(*(p or zero for p in both), lane_numbers(range(lane, lane + L)))
                        sums[j % 3] = b.call(fma, [weights[i][j], pixels, sums[j % 3]])
                total = b.fadd(b.fadd(sums[0], sums[1]), sums[2])
                room = OH * W - number * L
                wanted = None if room >= L else ir.Constant(bits, [lane < room for lane in range(L)])
                deliver(b, total, _n(4 * L * number), y, residual if adding else None, wanted, low, up)
        return ctx.get_dummy_value()

    return types.void(kernel, high, wide, out_high, top, left, lanes, add, *[_int] * 9), gen


@intrinsic(prefer_literal=True)
def fold(
    typing, kernel, lanes, add,
    room, y, w, bias, residual, masks, left, wide, together, out_high, low, up,
):  # fmt: skip
    """One plane of narrow images, stride 1: a vector holds `together` output lines, one after the other.

    room holds the plane, as wide as the output, with its padding above and below; masks holds the bits of the lanes
    whose column is real for each kx.
    """
    K, L, adding = kernel.literal_value, lanes.literal_value, add.literal_value
    parts, kind, bits = min(K, 3), ir.VectorType(_F32, L), ir.VectorType(_I1, L)

    def gen(ctx, b, sig, args):
        room, y, w, bias, residual, masks, left, wide, together, out_high, low, up = args[3:]
        fma = _declare(b, f"llvm.fmuladd.v{L}f32", kind, kind, kind, kind)
        weights = [[_splat(b, _load(b, b.add(w, _n(4 * (K * i + j))), _F32, 4), L) for j in range(K)] for i in range(K)]
        low, up = (_splat(b, _load(b, at, _F32, 4), L) for at in (low, up))
        start, zero = _splat(b, _load(b, bias, _F32, 4), L), ir.Constant(kind, None)
        real = [b.bitcast(_load(b, b.add(masks, _n(8 * j)), ir.IntType(L), 2), bits) for j in range(K)]
        first, line = b.sub(room, b.mul(left, _n(4))), b.mul(wide, _n(4))
        loop = _Loop(b, _n(0), b.sdiv(b.add(out_high, b.sub(together, _n(1))), together), 1, [])
        top = b.mul(loop.i, together)
        at = b.add(first, b.mul(top, line))
        sums = [start] + [zero] * (parts - 1)
        for i in range(K):
            for j in range(K):
                taken = _masked_load(b, b.add(at, _n(4 * j)), real[j], L)
                sums[j % parts] = b.call(fma, [weights[i][j], taken, sums[j % parts]])
            at = b.add(at, line)
        total = sums[0]
        for more in sums[1:]:
            total = b.fadd(total, more)
        rows = at_most(b, b.sub(out_high, top), together)
        wanted = _lane_mask(b, b.mul(rows, wide), L)
        deliver(b, total, b.mul(top, line), y, residual if adding else None, wanted, low, up)
        loop.close([])
        return ctx.get_dummy_value()

    return types.void(kernel, lanes, add, *[_int] * 12), gen
