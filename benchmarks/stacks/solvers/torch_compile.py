"""torch.compile with its own defaults and frozen weights; needs a C++ compiler."""

import shutil

import torch

SPARSE = False


def why_not():
    return (
        None if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler; none is here"
    )


def prepare(stack, threads):
    from benchmarks.stacks.solvers.torch_eager import layers_of

    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True
    compiled, x = torch.compile(layers_of(stack)), stack.x
    return torch.inference_mode()(lambda: compiled(x))
