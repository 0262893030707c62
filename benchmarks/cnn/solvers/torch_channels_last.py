"""torch in eager mode, the way that suits it best: batch norms folded, channels last."""

import torch

SPARSE = False


def prepare(network, threads):
    from torch.fx.experimental.optimization import fuse

    torch.set_num_threads(threads)
    model = fuse(network.model.eval()).to(memory_format=torch.channels_last)
    x = network.example.contiguous(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: model(x))
