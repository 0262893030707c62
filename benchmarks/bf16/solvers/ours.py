"""Our groups of four rows in bfloat16, activations resident in bfloat16 panels or in images with their border."""

SPARSE = True


def prepare(stack, threads):
    import torch

    from benchmarks.bf16.solvers import _ours as ours

    if stack.name == "conv3x3":
        return ours.convolutions(stack, threads)
    return ours.prepare(stack, threads, ours.in_bfloat16, torch.bfloat16)
