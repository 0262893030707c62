"""LiteRT with XNNPACK in float32; dense, for XNNPACK's sparse kernels never run on x86 with AVX."""

from benchmarks.engines import tflite

SPARSE, ENVIRONMENT = False, "litert"


def prepare(files, threads):
    return tflite.prepare(files, threads)
