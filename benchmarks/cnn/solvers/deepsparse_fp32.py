"""DeepSparse 1.8.0 on the pruned network."""

from benchmarks.engines import deepsparse

SPARSE, ENVIRONMENT = True, "deepsparse"


def prepare(files, threads):
    return deepsparse.prepare(files, threads)
