"""OpenVINO in float32, to show what bfloat16 alone gains."""

from benchmarks.engines import openvino

SPARSE, READS_FILES = False, True


def prepare(files, threads):
    return openvino.prepare(files, threads)
