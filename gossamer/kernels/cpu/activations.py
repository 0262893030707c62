"""Activations as vector code: relu, relu6, gelu (erf and tanh forms), silu and hard swish, for any number of lanes.

Exponentials and erf are polynomials, because LLVM has no vector mathematics library of its own here. Every function
passes NaN on. Tested bound against float64: 2e-6 absolute.

With AVX-512 both gelus are cubics from a table of 32 pieces that two registers per coefficient hold: relu(x) - gelu(x)
is even and vanishes beyond |x| = 5.4. That measured faster than the formula with its division.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

NONE, RELU, GELU, GELU_TANH, SILU, RELU6, HARD_SWISH = range(7)

_F32 = ir.FloatType()
_I32 = ir.IntType(32)

# exp(r) on |r| <= ln(2)/2, minimax, relative error 2e-8 (the polynomial of Cephes expf).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0)
# erf by Abramowitz and Stegun 7.1.26: 1 - t (a1 + a2 t + ...) exp(-x^2), t = 1 / (1 + p x), error 1.5e-7.
_ERF_P = 0.3275911
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)

# Pieces per unit of |x|: piece 31 starts at 5.3, where |x| (1 - Phi(|x|)) is 3e-7.
_PIECES, _SCALE = 32, 5.74


class Vector:
    """Arithmetic on `<lanes x float>`, so that a formula reads like one."""

    def __init__(self, builder: ir.IRBuilder, lanes: int):
        self.b, self.lanes = builder, lanes
        self.type = ir.VectorType(_F32, lanes)
        self.int_type = ir.VectorType(_I32, lanes)

    def const(self, x: float):
        return ir.Constant(self.type, [ir.Constant(_F32, x)] * self.lanes)

    def int_const(self, x: int):
        return ir.Constant(self.int_type, [ir.Constant(_I32, x)] * self.lanes)

    def call(self, name: str, *args):
        """Call an LLVM intrinsic on whole vectors, such as "fma" or "fabs"."""
        module = self.b.module
        full = f"llvm.{name}.v{self.lanes}f32"
        declared = module.globals.get(full) or ir.Function(
            module, ir.FunctionType(self.type, [self.type] * len(args)), full
        )
        return self.b.call(declared, args)

    def fma(self, a, x, c):
        return self.call("fmuladd", a, x, c)

    def polynomial(self, coefficients, x):
        """Horner's rule, highest power first."""
        total = self.const(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.const(coefficient))
        return total

    def at_least(self, x, low: float):
        """max(x, low) that keeps NaN."""
        return self.b.select(self.b.fcmp_ordered("<", x, self.const(low)), self.const(low), x)

    def at_most(self, x, high: float):
        """min(x, high) that keeps NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, self.const(high)), self.const(high), x)

    def exp(self, x):
        """2^n exp(r), with x = n ln 2 + r and n rounded by adding 1.5 x 2^23."""
        b, magic = self.b, self.const(12582912.0)
        x = self.at_most(self.at_least(x, -87.3), 88.3)
        shifted = self.fma(x, self.const(1.0 / math.log(2.0)), magic)
        n = b.fsub(shifted, magic)
        r = self.fma(n, self.const(-0.693359375), x)
        r = self.fma(n, self.const(2.12194440e-4), r)
        bits = b.shl(b.bitcast(shifted, self.int_type), self.int_const(23))
        # The magic number's low bits are zero, so the shift leaves n in the exponent; 1.0 supplies the bias.
        scale = b.bitcast(b.add(bits, self.int_const(0x3F800000)), self.type)
        return b.fmul(self.polynomial(_EXP, r), scale)

    def cubic(self, table, s):
        """The piece of a table [4, 32] nearest to s (scaled, 0 <= s <= 31), at s. Needs 16 lanes of AVX-512."""
        b, magic = self.b, self.const(12582912.0)
        shifted = b.fadd(s, magic)
        r = b.fsub(s, b.fsub(shifted, magic))
        index = b.bitcast(shifted, self.int_type)
        total = self.look_up(table[0], index)
        for row in table[1:]:
            total = self.fma(total, r, self.look_up(row, index))
        return total

    def look_up(self, row, index):
        """row[index mod 32]: one two-register permutation."""
        name = "llvm.x86.avx512.vpermi2var.ps.512"
        kind = ir.FunctionType(self.type, [self.type, self.int_type, self.type])
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)
        low, high = (ir.Constant(self.type, [ir.Constant(_F32, float(x)) for x in row[i : i + 16]]) for i in (0, 16))
        return self.b.call(function, [low, index, high])

    def sigmoid(self, x):
        one = self.const(1.0)
        return self.b.fdiv(one, self.b.fadd(one, self.exp(self.b.fneg(x))))


def _table(distance) -> np.ndarray:
    """Cubic coefficients, highest power first, of `distance(s)` in 32 pieces centred on s = j / scale."""
    nodes = 0.5 * np.cos(np.pi * (2 * np.arange(4) + 1) / 8)
    columns = [np.polyfit(nodes, [distance((j + r) / _SCALE) for r in nodes], 3) for j in range(_PIECES)]
    # The first piece is exact at zero, so that small inputs keep their relative accuracy.
    near = 0.5 * (np.cos(np.pi * (2 * np.arange(3) + 1) / 6) + 1) / 2
    columns[0] = np.append(np.polyfit(near, [distance(r / _SCALE) / r for r in near], 2), 0.0)
    columns[-1] = np.zeros(4)
    return np.array(columns).T.astype(np.float32)


def _below_relu(s: float) -> float:
    """relu(x) - gelu(x) at |x| = s."""
    return 0.5 * s * math.erfc(s * math.sqrt(0.5))


def _below_relu_tanh(s: float) -> float:
    return s / (1.0 + math.exp(2.0 * math.sqrt(2.0 / math.pi) * (s + 0.044715 * s**3)))


def _from_table(v: Vector, x, distance):
    s = v.at_most(v.b.fmul(v.call("fabs", x), v.const(_SCALE)), _PIECES - 1.0)
    return v.b.fsub(v.at_least(x, 0.0), v.cubic(_table(distance), s))


def _gelu(v: Vector, x):
    if v.lanes == 16:
        return _from_table(v, x, _below_relu)
    b = v.b
    size = v.call("fabs", b.fmul(x, v.const(math.sqrt(0.5))))
    t = b.fdiv(v.const(1.0), v.fma(size, v.const(_ERF_P), v.const(1.0)))
    tail = b.fmul(b.fmul(v.polynomial(_ERF, t), t), v.exp(b.fneg(b.fmul(size, size))))
    # x Phi(x) = relu(x) - |x| tail / 2: exact zero and exact x far from the origin, no cancellation near it.
    half = b.fmul(v.call("fabs", x), v.const(0.5))
    return v.fma(b.fneg(half), tail, v.at_least(x, 0.0))


def _gelu_tanh(v: Vector, x):
    if v.lanes == 16:
        return _from_table(v, x, _below_relu_tanh)
    # 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
    scale = 2.0 * math.sqrt(2.0 / math.pi)
    inner = v.fma(v.b.fmul(x, x), v.const(0.044715 * scale), v.const(scale))
    return v.b.fmul(x, v.sigmoid(v.b.fmul(x, inner)))


def _silu(v: Vector, x):
    return v.b.fmul(x, v.sigmoid(x))


def _relu6(v: Vector, x):
    return v.at_most(v.at_least(x, 0.0), 6.0)


def _hard_swish(v: Vector, x):
    """x relu6(x + 3) / 6, the product of two rounded numbers as torch forms it."""
    gate = _relu6(v, v.b.fadd(x, v.const(3.0)))
    return v.b.fmul(v.b.fmul(x, gate), v.const(1.0 / 6.0))


_EMIT = {
    NONE: lambda v, x: x,
    RELU: lambda v, x: v.at_least(x, 0.0),
    GELU: _gelu,
    GELU_TANH: _gelu_tanh,
    SILU: _silu,
    RELU6: _relu6,
    HARD_SWISH: _hard_swish,
}


def emit(v: Vector, code: int, x):
    """Emit activation `code` of vector `x`."""
    return _EMIT[code](v, x)
