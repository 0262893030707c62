"""Our product over unstructured zeros: rows by themselves, columns in blocks for the first-level cache."""

from benchmarks.stacks.solvers import _ours as ours

SPARSE = True


def runs(case):
    return case.labels["pattern"] == "unstructured"


def prepare(stack, threads):
    return ours.prepare(stack, threads, 1)
