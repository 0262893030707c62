"""Our groups of four rows in 8-bit integers, activations quantised before every layer (not for 3x3 convolutions)."""

SPARSE = True


def runs(case):
    return case.labels["stack"] != "conv3x3"


def prepare(stack, threads):
    import torch

    from benchmarks.bf16.solvers import _ours as ours

    return ours.prepare(stack, threads, ours.in_8_bits, torch.float32)
