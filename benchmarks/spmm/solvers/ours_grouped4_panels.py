"""Groups of four rows, with hidden activations left in panels between layers (linear layers only)."""

from benchmarks.spmm.solvers import ours

TIED, SPARSE = 4, True
STACKS = ("mlp",)


def prepare(stack, threads):
    return ours.prepare(stack, threads, 4, in_panels=True)
