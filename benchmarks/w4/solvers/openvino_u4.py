"""OpenVINO with u4 weights, float16 scales and zero points per 128, as its weight compression writes them."""

from benchmarks.decode.solvers._cold import in_turn
from benchmarks.decode.solvers.openvino import compiled
from benchmarks.w4.problem import SHARED, codes

SPARSE = False


def prepare(data, threads):
    import numpy as np
    import openvino as ov
    import openvino.opset13 as ops

    found, scale, zero = (t.numpy() for t in codes(data.w_MK))
    rows, cols = found.shape
    feed, shape, alive = data.x_TK.numpy(), (rows, cols // SHARED, SHARED), []

    def u4(numbers, shape):
        halves = numbers.reshape(-1, 2).astype(np.uint8)
        octets = halves[:, 0] | halves[:, 1] << 4
        alive.append(octets)  # the constant points into it
        return ops.constant(ov.Tensor(octets, ov.Shape(shape), ov.Type.u4))

    def make():
        x = ops.parameter(list(feed.shape), np.float32)
        w = ops.convert(u4(found, shape), "f16")
        w = ops.subtract(w, ops.convert(u4(zero, (*shape[:2], 1)), "f16"))
        w = ops.multiply(w, ops.constant(scale[..., None].astype(np.float16)))
        w = ops.convert(ops.reshape(w, ops.constant(np.array([rows, cols])), False), "f32")
        return compiled(ops.matmul(x, w, False, True), x, "bf16", threads)

    return in_turn(make, found.size // 2, lambda request: request.infer([feed], share_inputs=True)[0])
