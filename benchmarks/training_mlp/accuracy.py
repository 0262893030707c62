"""Test accuracy after the same steps from the same start: packed weights against masked dense ones.

python -m benchmarks.training_mlp.accuracy [--steps 469] [--density 0.01]
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.results import write_results
from benchmarks.training_mlp import network
from gossamer.data import fashion_mnist
from gossamer.nn import SparseLinear


def packed(data: network.Start) -> torch.nn.Sequential:
    """The network on packed weights."""
    sparse = [SparseLinear.from_dense(layer, mask) for layer, mask in zip(data.layers, data.masks)]
    return network.chain(*sparse, data.layers[2])


def train(net: torch.nn.Module, steps: int, batch: int = 128) -> tuple[float, float, float]:
    """Last loss, test accuracy in %, and seconds of training; batches in one fixed shuffled order."""
    data = fashion_mnist()
    x, y, rng = network.pictures(data.train), data.train.labels, torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    order = torch.cat([torch.randperm(len(y), generator=rng) for _ in range(1 + steps * batch // len(y))])
    begin = time.perf_counter()
    for step in range(steps):
        chosen = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad(set_to_none=True)
        loss = network.loss_of(net, x[chosen], y[chosen])
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        answers = torch.cat([net(part).argmax(1) for part in network.pictures(data.test).split(1000)])
    return float(loss.detach()), 100 * float((answers == data.test.labels).float().mean()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=469)
    parser.add_argument("--density", type=float, default=0.01)
    options = parser.parse_args()
    start = network.start(128, options.density)
    rows = {
        name: train(build(start), options.steps) for name, build in (("packed", packed), ("masked", network.masked))
    }
    record = {"steps": options.steps, "density": options.density, "threads": torch.get_num_threads(), "runs": rows}
    heads = ["training", "steps", "last loss", "test accuracy, %", "seconds"]
    cells = [[n, str(options.steps), f"{a:.5f}", f"{b:.2f}", f"{c:.1f}"] for n, (a, b, c) in rows.items()]
    print(write_results("training_mlp_accuracy", record, heads, cells, ["seconds are of a busy machine: no speed-up"]))


if __name__ == "__main__":
    main()
