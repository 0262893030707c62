"""torch as a user calls it."""

import torch

SPARSE = False


def prepare(network, threads):
    torch.set_num_threads(threads)
    return network.output
