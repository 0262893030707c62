"""The cheapest dense way in torch: plain layers that start pruned, and masks on their gradients only."""

SPARSE = False


def prepare(data, threads):
    from torch import nn

    from benchmarks.training_mlp import network
    from benchmarks.training_mlp.solvers._step import prepared

    def build(data):
        layers = [nn.Linear(layer.in_features, layer.out_features) for layer in data.layers[:2]]
        for mine, layer in zip(layers, data.layers):
            mine.load_state_dict(layer.state_dict())
        return network.chain(*layers, data.layers[2])

    def after(net):
        for layer, mask in zip((net[0], net[2]), data.masks):
            layer.weight.grad.mul_(mask)

    return prepared(data, threads, build, after=after, extra=lambda net: data.masks)
