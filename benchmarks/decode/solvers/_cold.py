"""Copies of a weight that are used in turn, so that each call reads its weight from memory."""

from itertools import cycle

# Several times the last-level cache of any machine this has run on.
ENOUGH = 256_000_000


def in_turn(make, nbytes, call):
    """A function that calls with the next of `ENOUGH` bytes of copies; `make()` gives a fresh one."""
    copies = cycle([make() for _ in range(max(2, -(-ENOUGH // max(1, nbytes))))])
    return lambda: call(next(copies))
