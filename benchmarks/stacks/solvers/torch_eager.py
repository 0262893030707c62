"""torch as a user writes it: modules in eager mode."""

import torch
from torch import nn

SPARSE = False


def layers_of(stack):
    """The stack as nn.Sequential."""
    modules = []
    for layer in stack.layers:
        rows, cols = layer.w_MK.shape
        if layer.kernel:
            module = nn.Conv2d(layer.w_MCHW.shape[1], rows, layer.kernel, padding=layer.kernel // 2)
            module.weight = nn.Parameter(layer.w_MCHW, requires_grad=False)
        else:
            module = nn.Linear(cols, rows)
            module.weight = nn.Parameter(layer.w_MK, requires_grad=False)
        module.bias = nn.Parameter(layer.bias_M, requires_grad=False)
        modules += [module, nn.ReLU()] if layer.activation == "relu" else [module]
    return nn.Sequential(*modules).eval()


def prepare(stack, threads):
    torch.set_num_threads(threads)
    network, x = layers_of(stack), stack.x
    return torch.inference_mode()(lambda: network(x))
