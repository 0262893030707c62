"""Our decoder: pruned layers as tile bitmasks, the head dense."""

from benchmarks.llm_decode.solvers import _ours

SPARSE = True


def prepare(task, threads):
    return _ours.prepare(task, threads)
