"""torch.compile with frozen weights; needs a C++ compiler."""

import torch

from benchmarks.engines import torch_compile
from benchmarks.stacks.solvers.torch_eager import layers_of

SPARSE, why_not = False, torch_compile.why_not


def prepare(stack, threads):
    network, x = torch_compile.compiled(layers_of(stack), threads), stack.x
    return torch.inference_mode()(lambda: network(x))
