"""torch.compile with frozen weights; needs a C++ compiler."""

from benchmarks.engines import torch_compile

SPARSE, why_not = False, torch_compile.why_not


def prepare(network, threads):
    compiled = torch_compile.compiled(network.model, threads)
    return lambda: network.output(compiled)
