"""A small language for writing vector code: memory, loops and exponentials on top of `activations.Vector`.

Addresses are plain 64-bit integers; a `Code` turns them into loads and stores of `<lanes x float>`.
"""

from __future__ import annotations

from llvmlite import ir

from gossamer.kernels.cpu.activations import Vector

I1, I32, I64 = (ir.IntType(n) for n in (1, 32, 64))
F32 = ir.FloatType()
# 2^r on |r| <= 1/2, least relative error among polynomials that are 1 at 0: 1.0e-7 in exact arithmetic.
_EXP2 = (1.3218672481e-3, 9.6716979384e-3, 5.5508929525e-2, 2.4022238003e-1, 6.9314685594e-1, 1.0)


class Code(Vector):
    """Vector arithmetic, and the memory and loops around it."""

    def n(self, x: int):
        """A 64-bit constant."""
        return ir.Constant(I64, x)

    def at(self, address, offset: int):
        """The address `offset` bytes on."""
        return self.b.add(address, self.n(offset)) if offset else address

    def load(self, address, offset: int = 0):
        """The vector at an address, on any boundary."""
        value = self.b.load(self.b.inttoptr(self.at(address, offset), self.type.as_pointer()))
        value.align = 4
        return value

    def store(self, value, address, offset: int = 0):
        """Write a vector to an address, on any boundary."""
        pointer = self.b.inttoptr(self.at(address, offset), self.type.as_pointer())
        self.b.store(value, pointer).align = 4

    def scalar(self, address, offset: int = 0):
        """The float at an address."""
        value = self.b.load(self.b.inttoptr(self.at(address, offset), F32.as_pointer()))
        value.align = 4
        return value

    def spread(self, scalar):
        """A scalar in every lane."""
        undefined = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(self.int_type, [0] * self.lanes))

    def splat(self, address, offset: int = 0):
        """The float at an address in every lane."""
        return self.spread(self.scalar(address, offset))

    def lanes_from(self, first: int):
        """The lane numbers first, first + 1, ... as a constant."""
        return ir.Constant(self.int_type, list(range(first, first + self.lanes)))

    def below(self, count, first: int = 0):
        """Mask of the lanes whose number, counted from `first`, is below a run-time count."""
        limit = self.spread(self.b.trunc(count, I32))
        return self.b.icmp_signed("<", self.lanes_from(first), limit)

    def larger(self, x, y):
        """The larger of two vectors, as one instruction; a NaN in x gives y."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def exp2(self, x):
        """2^x for x <= 0: exactly 0 below -127 and 1 at 0, relative error 2e-7.

        It is 2^n 2^r with x = n + r and n rounded by adding 1.5 x 2^23, whose low bits then are n.
        """
        b, magic = self.b, self.const(12582912.0)
        x = self.at_least(x, -127.0)
        shifted = b.fadd(x, magic)
        power = self.polynomial(_EXP2, b.fsub(x, b.fsub(shifted, magic)))
        bits = b.shl(b.bitcast(shifted, self.int_type), self.int_const(23))
        return b.bitcast(b.add(b.bitcast(power, self.int_type), bits), self.type)

    def repeat(self, start, stop, step: int, carried, body):
        """`for i in range(start, stop, step): carried = body(i, carried)`, for whole steps only.

        Returns where it stopped and what was carried, for a loop of single steps to go on from.
        """
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("repeat", "repeat.body", "repeat.end"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        i.add_incoming(start, before)
        values = [b.phi(value.type) for value in carried]
        for phi, value in zip(values, carried):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<=", b.add(i, self.n(step)), stop), inside, after)
        b.position_at_end(inside)
        results = body(i, list(values))
        i.add_incoming(b.add(i, self.n(step)), b.block)
        for phi, value in zip(values, results):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return i, values

    def unrolled(self, count, times: int, carried, body):
        """`for i in range(count): carried = body(i, carried)`, `times` turns at once; returns what was carried."""

        def several(i, values):
            for turn in range(times):
                values = body(self.at(i, turn), values)
            return values

        i, carried = self.repeat(self.n(0), count, times, carried, several)
        return self.repeat(i, count, 1, carried, body)[1] if times > 1 else carried
