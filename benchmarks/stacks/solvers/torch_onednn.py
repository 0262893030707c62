"""oneDNN through torch's own prepacked operators: positions as rows for linear and 1x1, channels last for 3x3."""

import torch

SPARSE = False


def prepare(stack, threads):
    torch.set_num_threads(threads)
    ops = torch.ops.mkldnn
    images, wide = stack.x.dim() == 4, stack.x.shape[-1]
    positions = wide * wide if images else stack.x.shape[0]
    x_rows = stack.x[0].flatten(1).T.contiguous() if images else stack.x
    x_last = stack.x.contiguous(memory_format=torch.channels_last) if images else None

    def packed(layer):
        if layer.kernel != 3:
            return ops._reorder_linear_weight(layer.w_MK, positions)
        size = list(stack.x.shape)
        return ops._reorder_convolution_weight(layer.w_MCHW, [1, 1], [1, 1], [1, 1], 1, size)

    layers = [(packed(layer), layer) for layer in stack.layers]

    @torch.inference_mode()
    def rows():
        x = x_rows
        for w, layer in layers:
            x = ops._linear_pointwise(x, w, layer.bias_M, layer.activation, [], "")
        return x.T.view(1, -1, wide, wide) if images else x

    @torch.inference_mode()
    def spatial():
        x = x_last
        for w, layer in layers:
            x = ops._convolution_pointwise(x, w, layer.bias_M, [1, 1], [1, 1], [1, 1], 1, layer.activation, [], "")
        return x

    return spatial if stack.layers[0].kernel == 3 else rows
