"""What our solvers share: weights to streams, and a stack run layer after layer through ordinary tensors."""

from __future__ import annotations

import torch

from benchmarks.stacks.stacks import Layer, Stack
from gossamer.kernels.cpu.conv import spmm_conv
from gossamer.kernels.cpu.spmm import spmm, spmm_columns
from gossamer.kernels.cpu.stream import Stream, stream


def to_stream(layer: Layer, g: int) -> Stream:
    """Compress a matrix whose groups of g rows share their kept columns."""
    w_MK = layer.w_MK
    rows, cols = w_MK.shape
    kept = (w_MK != 0).view(rows // g, g, cols).any(1)
    group_E, column_E = kept.nonzero(as_tuple=True)
    indptr = torch.zeros(rows // g + 1, dtype=torch.int32)
    indptr[1:] = kept.sum(1).cumsum(0)
    values = w_MK.view(rows // g, g, cols)[group_E, :, column_E].contiguous()
    # Nine columns of a 3x3 kernel read one channel's pixels, so three times as many fit into the first-level cache.
    block = 432 if layer.kernel == 3 and g == 1 else None
    return stream(g, rows, cols, indptr, column_E.to(torch.uint16), values, block=block)


def prepare(stack: Stack, threads: int, g: int):
    """Layers one after the other, through ordinary tensors."""
    torch.set_num_threads(threads)
    layers = [(to_stream(layer, g), layer) for layer in stack.layers]

    def mlp():
        x = stack.x
        for weight, layer in layers:
            x = spmm(weight, x, layer.bias_M, layer.activation)
        return x

    def pointwise():
        x = stack.x[0].flatten(1)
        for weight, layer in layers:
            x = spmm_columns(weight, x, layer.bias_M, layer.activation)
        return x.view(1, -1, *stack.x.shape[2:])

    def spatial():
        x = stack.x
        for weight, layer in layers:
            x = spmm_conv(weight, x, (3, 3), (1, 1), layer.bias_M, layer.activation)
        return x

    return {"mlp": mlp, "conv1x1": pointwise, "conv3x3": spatial}[stack.name]
