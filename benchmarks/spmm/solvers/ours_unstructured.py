"""Our product over unstructured zeros: rows by themselves, columns in blocks for the first-level cache."""

from benchmarks.spmm.solvers import ours

TIED, SPARSE = 1, True


def prepare(stack, threads):
    return ours.prepare(stack, threads, 1)
