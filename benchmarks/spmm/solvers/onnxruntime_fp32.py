"""onnxruntime in float32: the whole stack as one graph, its pool without spinning."""

import torch

from benchmarks.spmm.solvers.graph import onnx_bytes

TIED, SPARSE = 1, False


def prepare(stack, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(onnx_bytes(stack), options, providers=["CPUExecutionProvider"])
    feed = {"x": stack.x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
