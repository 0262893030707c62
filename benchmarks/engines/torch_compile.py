"""torch.compile with its own defaults and frozen weights; needs a C++ compiler."""

import shutil


def why_not():
    there = shutil.which("g++") or shutil.which("clang++")
    return None if there else "torch.compile needs a C++ compiler; none is here"


def compiled(model, threads):
    import torch

    torch.set_num_threads(threads)
    torch._inductor.config.freezing = True
    return torch.compile(model.eval())
