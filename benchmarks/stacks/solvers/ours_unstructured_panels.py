"""Unstructured zeros, with hidden activations left in panels or planes between layers."""

from benchmarks.stacks.solvers import _panels as ours

SPARSE = True


def runs(case):
    return case.labels["pattern"] == "unstructured"


def prepare(stack, threads):
    return ours.prepare(stack, threads, 1)
