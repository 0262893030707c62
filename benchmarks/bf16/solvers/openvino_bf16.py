"""OpenVINO told to compute in bfloat16."""

from benchmarks.engines import openvino

SPARSE, READS_FILES = False, True


def prepare(files, threads):
    return openvino.prepare(files, threads, precision="bf16")
