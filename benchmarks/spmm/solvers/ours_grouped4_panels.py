"""Groups of four rows, with hidden activations left in panels between layers (not for 3x3 convolutions)."""

from benchmarks.spmm.solvers import ours

TIED, SPARSE = 4, True
STACKS = ("conv1x1", "mlp")


def prepare(stack, threads):
    return ours.prepare(stack, threads, 4, in_panels=True)
