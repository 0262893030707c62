"""gossamer.pack: sparse layers in our kernels, one by one, everything else as torch has it."""

SPARSE = True


def prepare(network, threads):
    import torch

    import gossamer

    torch.set_num_threads(threads)
    packed = gossamer.pack(network.model, network.example, remeasure=True)
    return lambda: network.output(packed)
