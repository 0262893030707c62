"""gossamer.spgemm: scipy in, scipy out, columns ascending."""

SPARSE = True


def prepare(data, threads):
    import torch

    from benchmarks.harness import Prepared
    from benchmarks.spgemm.solvers._entries import entries
    from gossamer import spgemm

    torch.set_num_threads(threads)

    def run():
        return spgemm(data.a, data.b, mask=data.mask)

    return Prepared(run, lambda: entries(run()))
