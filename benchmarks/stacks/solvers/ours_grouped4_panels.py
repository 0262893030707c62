"""Groups of four rows, with hidden activations left in panels between layers (not for 3x3 convolutions)."""

from benchmarks.stacks.solvers import _panels as ours

SPARSE = True


def runs(case):
    return case.labels["pattern"] == "rows by 4" and case.labels["stack"] != "conv3x3"


def prepare(stack, threads):
    return ours.prepare(stack, threads, 4)
