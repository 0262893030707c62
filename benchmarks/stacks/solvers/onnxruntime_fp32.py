"""onnxruntime in float32: the whole stack as one graph, at its own defaults."""

from benchmarks.engines import onnxruntime

SPARSE, READS_FILES = False, True


def prepare(files, threads):
    return onnxruntime.prepare(files, threads)
