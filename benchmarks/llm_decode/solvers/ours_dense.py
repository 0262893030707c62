"""Our decoder on the model as it was trained."""

from benchmarks.llm_decode.solvers import _ours

SPARSE = False


def prepare(task, threads):
    return _ours.prepare(task, threads)
