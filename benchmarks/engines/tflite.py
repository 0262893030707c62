"""LiteRT (TensorFlow Lite) with XNNPACK, on a chain of layers. The model file is written here by LiteRT's own schema.

XNNPACK has sparse kernels, but switches them off on every x86 processor with AVX, so on those this is a dense engine
whatever the weights are.
"""

import numpy as np

VERSION = 3


def prepare(folder, threads):
    """Read layers.npz: x, and per layer w0, b0, relu0 ... in the order of the names; w is [M, K] or [M, C, k, k]."""
    from ai_edge_litert.interpreter import Interpreter

    with np.load(folder / "layers.npz") as held:
        layers = [(held[f"w{i}"], held[f"b{i}"], bool(held[f"relu{i}"])) for i in range(len(held.files) // 3)]
        x = held["x"]
    images = x.ndim == 4
    x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if images else x
    interpreter = Interpreter(model_content=model_bytes(x, layers), num_threads=threads)
    interpreter.allocate_tensors()
    first, last = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def run():
        interpreter.set_tensor(first, x)
        interpreter.invoke()
        y = interpreter.get_tensor(last)
        return y.transpose(0, 3, 1, 2) if images else y

    return run


def model_bytes(x, layers):
    """A .tflite file: Conv2D or FullyConnected operators with fused ReLU, channels last."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    images = x.ndim == 4
    graph = _Graph(schema)
    last = graph.add("x", x.shape)
    first = last
    for i, (w, b, relu) in enumerate(layers):
        w = np.ascontiguousarray(w.transpose(0, 2, 3, 1)) if images else w
        ends = [last, graph.add(f"w{i}", w.shape, w), graph.add(f"b{i}", b.shape, b)]
        last = graph.add(f"y{i}", (*x.shape[:-1], w.shape[0]))
        graph.operate(ends, last, _options(schema, relu, images), images)
    model = graph.model(first, last, images)
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _options(schema, relu, images):
    options = schema.Conv2DOptionsT() if images else schema.FullyConnectedOptionsT()
    kinds = schema.ActivationFunctionType
    options.fusedActivationFunction = kinds.RELU if relu else kinds.NONE
    if images:
        options.padding, options.strideH, options.strideW = schema.Padding.SAME, 1, 1
        options.dilationHFactor = options.dilationWFactor = 1
    return options


class _Graph:
    """Tensors, their buffers and operators of one subgraph, as the schema wants them."""

    def __init__(self, schema):
        self.schema, self.tensors, self.operators = schema, [], []
        self.buffers = [schema.BufferT()]  # buffer 0 stands for tensors without data

    def add(self, name, shape, values=None):
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), self.schema.TensorType.FLOAT32, 0
        if values is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(values.astype(np.float32).tobytes(), np.uint8)
            tensor.buffer = len(self.buffers)
            self.buffers.append(buffer)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operate(self, inputs, output, options, images):
        operator, kinds = self.schema.OperatorT(), self.schema.BuiltinOptions
        operator.opcodeIndex, operator.inputs, operator.outputs = 0, inputs, [output]
        operator.builtinOptionsType = kinds.Conv2DOptions if images else kinds.FullyConnectedOptions
        operator.builtinOptions = options
        self.operators.append(operator)

    def model(self, first, last, images):
        schema = self.schema
        subgraph, code, model = schema.SubGraphT(), schema.OperatorCodeT(), schema.ModelT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs, subgraph.name = [first], [last], "main"
        builtin = schema.BuiltinOperator.CONV_2D if images else schema.BuiltinOperator.FULLY_CONNECTED
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        code.version = 1
        model.version, model.subgraphs, model.operatorCodes = VERSION, [subgraph], [code]
        model.buffers, model.description = self.buffers, "layers in a row"
        return model
