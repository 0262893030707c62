"""gossamer.compile: the whole network on panels, from its pruned weights."""

SPARSE = True


def prepare(network, threads):
    import torch

    import gossamer

    torch.set_num_threads(threads)
    fast = gossamer.compile(network.model, network.example, remeasure=True)
    return lambda: network.output(fast)
