"""torch's CSR product (MKL), features x positions so that nothing is transposed; 3x3 convolutions unfold first."""

import torch
from torch.nn.functional import unfold

SPARSE = True


def prepare(stack, threads):
    torch.set_num_threads(threads)
    layers = [(layer.w_MK.to_sparse_csr(), layer.bias_M[:, None], layer) for layer in stack.layers]
    images = stack.x.dim() == 4
    x_first = stack.x[0].flatten(1) if images else stack.x.T.contiguous()

    def run():
        x = x_first
        for w, bias, layer in layers:
            if layer.kernel == 3:
                x = unfold(x.view(1, -1, *stack.x.shape[2:]), 3, padding=1)[0]
            x = torch.mm(w, x).add_(bias)
            x = x.relu_() if layer.activation == "relu" else x
        return x.view(1, -1, *stack.x.shape[2:]) if images else x.T

    return run
