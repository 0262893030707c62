"""The stack as one ONNX graph, for engines that want the whole network."""

from onnx import TensorProto, helper, numpy_helper


def onnx_bytes(stack) -> bytes:
    """Serialise Conv or Gemm nodes, each followed by its Relu; a version that the oldest engine here reads."""
    nodes, weights, last = [], [], "x"
    for i, layer in enumerate(stack.layers):
        w = layer.w_MCHW if layer.kernel else layer.w_MK
        weights += [numpy_helper.from_array(w.numpy(), f"w{i}"), numpy_helper.from_array(layer.bias_M.numpy(), f"b{i}")]
        inputs, name = [last, f"w{i}", f"b{i}"], f"y{i}"
        if layer.kernel:
            nodes.append(helper.make_node("Conv", inputs, [name], pads=[layer.kernel // 2] * 4))
        else:
            nodes.append(helper.make_node("Gemm", inputs, [name], transB=1))
        if layer.activation == "relu":
            nodes.append(helper.make_node("Relu", [name], [f"r{i}"]))
            name = f"r{i}"
        last = name
    shape_in, shape_out = list(stack.x.shape), list(stack.x.shape)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape_in), (last, shape_out))]
    graph = helper.make_graph(nodes, stack.name, ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return model.SerializeToString()
