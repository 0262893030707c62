"""Our decoder, the head at four bits."""

from benchmarks.llm_decode.solvers import _ours

SPARSE = True


def prepare(task, threads):
    from gossamer.formats import Int4Groups

    return _ours.prepare(task, threads, Int4Groups.from_dense)
