"""OpenVINO in float32: the whole stack as one graph, on exactly the threads asked for."""

import torch

from benchmarks.stacks.solvers._graph import onnx_bytes

SPARSE = False


def prepare(stack, threads):
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(onnx_bytes(stack), b""), "CPU", settings)
    request, x = compiled.create_infer_request(), stack.x.numpy()

    def run():
        request.infer({0: x}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run
