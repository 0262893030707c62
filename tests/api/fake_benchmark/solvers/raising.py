"""Raises."""

SPARSE = True


def prepare(data, threads):
    raise ArithmeticError("no such product")
