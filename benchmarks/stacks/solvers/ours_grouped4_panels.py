"""Groups of four rows, with hidden activations left in panels or planes between layers."""

from benchmarks.stacks.solvers import _panels as ours

SPARSE = True


def runs(case):
    return case.labels["pattern"] == "rows by 4"


def prepare(stack, threads):
    return ours.prepare(stack, threads, 4)
