"""torch modules converted to bfloat16, eager, channels last where there are channels."""

import torch

from benchmarks.stacks.solvers.torch_eager import layers_of

SPARSE = False


def prepare(stack, threads):
    torch.set_num_threads(threads)
    network, x = layers_of(stack).bfloat16(), stack.x.bfloat16()
    if x.dim() == 4:
        network, x = (t.to(memory_format=torch.channels_last) for t in (network, x))
    return torch.inference_mode()(lambda: network(x))
