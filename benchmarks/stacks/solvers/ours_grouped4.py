"""Our product over groups of four rows that share their kept columns."""

from benchmarks.stacks.solvers import _ours as ours

SPARSE = True


def runs(case):
    return case.labels["pattern"] == "rows by 4"


def prepare(stack, threads):
    return ours.prepare(stack, threads, 4)
