"""OpenVINO in float32: the whole stack as one graph."""

from benchmarks.engines import openvino

SPARSE, READS_FILES = False, True


def prepare(files, threads):
    return openvino.prepare(files, threads)
