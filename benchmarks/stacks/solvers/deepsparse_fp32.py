"""DeepSparse 1.8.0 in float32: the whole stack as one graph."""

from benchmarks.engines import deepsparse

SPARSE, ENVIRONMENT = True, "deepsparse"


def prepare(files, threads):
    return deepsparse.prepare(files, threads)
