"""onnxruntime in float32."""

from benchmarks.engines import onnxruntime

SPARSE, READS_FILES = False, True


def prepare(files, threads):
    return onnxruntime.prepare(files, threads)
