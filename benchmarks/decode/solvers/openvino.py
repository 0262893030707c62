"""OpenVINO: one MatMul over a constant, in the case's precision."""

import torch

from benchmarks.decode.solvers._cold import in_turn

SPARSE = False
PRECISION = {torch.bfloat16: "bf16", torch.float32: "f32"}


def compiled(result, x, precision, threads):
    """A model of one result, as a function of x."""
    import openvino as ov

    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    return ov.compile_model(ov.Model([result], [x]), "CPU", options).create_infer_request()


def prepare(data, threads):
    import numpy as np
    import openvino.opset13 as ops

    feed = data.x_TK.float().numpy()

    def make():
        x = ops.parameter(list(feed.shape), np.float32)
        product = ops.matmul(x, ops.constant(data.w_MK.float().numpy()), False, True)
        return compiled(product, x, PRECISION[data.w_MK.dtype], threads)

    return in_turn(make, data.w_MK.nbytes, lambda request: request.infer([feed], share_inputs=True)[0])
