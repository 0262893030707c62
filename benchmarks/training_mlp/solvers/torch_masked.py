"""Masked dense training in torch: weight times mask at each call, fused Adam on dense moments."""

SPARSE = False


def prepare(data, threads):
    from benchmarks.training_mlp import network
    from benchmarks.training_mlp.solvers._step import prepared

    return prepared(data, threads, network.masked)
