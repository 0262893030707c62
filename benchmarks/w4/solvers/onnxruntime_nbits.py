"""onnxruntime's MatMulNBits, 4 bits per 128, inputs at int8 (its fastest accuracy level)."""

from benchmarks.decode.solvers._cold import in_turn
from benchmarks.w4.problem import SHARED, codes

SPARSE = False


def prepare(data, threads):
    import numpy as np
    import onnx
    import onnxruntime as ort

    found, scale, zero = (t.numpy() for t in codes(data.w_MK))
    rows, cols = found.shape

    def halves(numbers):
        pairs = numbers.astype(np.uint8).reshape(rows, -1, 2)
        return pairs[..., 0] | pairs[..., 1] << 4

    weights = {
        "w": halves(found).reshape(rows, cols // SHARED, SHARED // 2),
        "s": scale.reshape(-1).astype(np.float32),
        "z": halves(zero).reshape(-1),
    }
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", K=cols, N=rows, bits=4, block_size=SHARED,
        accuracy_level=4,
    )  # fmt: skip
    tokens = data.x_TK.shape[0]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "w4", [value("x", 1, [tokens, cols])], [value("y", 1, [tokens, rows])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    sets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    options, feed = ort.SessionOptions(), {"x": data.x_TK.numpy()}
    options.intra_op_num_threads, options.log_severity_level = threads, 3

    def make():
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    return in_turn(make, found.size // 2, lambda session: session.run(None, feed)[0])
