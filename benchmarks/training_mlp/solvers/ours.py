"""SparseLinear: kept weights only, forward, backward and in fused Adam."""

SPARSE = True


def prepare(data, threads):
    from benchmarks.training_mlp import network
    from benchmarks.training_mlp.solvers._step import prepared
    from gossamer.nn import SparseLinear

    def build(data):
        sparse = [SparseLinear.from_dense(layer, mask) for layer, mask in zip(data.layers, data.masks)]
        return network.chain(*sparse, data.layers[2])

    def extra(net):
        from gossamer.kernels.training import kept_tensors

        return [t for layer in (net[0], net[2]) for t in kept_tensors(layer.indices)]

    return prepared(data, threads, build, extra=extra)
