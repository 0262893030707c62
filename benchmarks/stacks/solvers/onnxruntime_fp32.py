"""onnxruntime in float32: the whole stack as one graph, at its own defaults."""

import torch

from benchmarks.stacks.solvers._graph import onnx_bytes

SPARSE = False


def prepare(stack, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(onnx_bytes(stack), options, providers=["CPUExecutionProvider"])
    feed = {"x": stack.x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
