"""DeepSparse 1.8.0 on the network as it was trained: a dense engine like any other."""

from benchmarks.engines import deepsparse

SPARSE, ENVIRONMENT = False, "deepsparse"


def prepare(files, threads):
    return deepsparse.prepare(files, threads)
