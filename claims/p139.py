"""P139, Liu, Ghosh, Tan & Motani, AP: Selective Activation for De-sparsifying Pruned Networks, arXiv:2212.06145."""

from __future__ import annotations

from functools import lru_cache
from statistics import mean, stdev

import torch
from torch import nn
from torch.nn import functional

from claims.outcome import Outcome
from claims.p127 import lenet
from gossamer.data.tasks.clothes import accuracy, tensors
from gossamer.recipes.activating import activating_ticket
from gossamer.recipes.dead_neurons import DeadNeurons, dead_neurons

CLAIM = "Cutting some negative weights that barely learned leaves fewer neurons dead, and lifts pruned networks."
PAPER = "lower dynamic dead neuron rate; 3 to 4 % more accuracy with five pruning methods on CIFAR-10/100 (abstract)"
RULE = (
    "LeNet-300-100 on Fashion-MNIST, iterative magnitude pruning to 6 % in rounds of 20 %, with and without 2 of the "
    "20 by AP, three seeds: the last ticket has a lower dynamic dead neuron rate on the test images and a higher "
    "accuracy, both by more than the standard error of the paired difference"
)
KEPT = 0.06


@lru_cache
def _flat() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, test, _ = tensors()
    return x.flatten(1), y, test.flatten(1)


def _run(seed: int, steps: int, activating: float) -> tuple[float, DeadNeurons]:
    """Accuracy of the last ticket, and its dead neurons."""
    x, y, test = _flat()

    def train(model: nn.Module, handle) -> None:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.Adam(model.parameters(), 1.2e-3)
        for step in range(handle.steps, steps):
            part = order[(step * 60) % len(x) :][:60]
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            handle.step()

    model = lenet(seed)
    activating_ticket(model, train, density=KEPT, activating=activating)
    return accuracy(nn.Sequential(nn.Flatten(), model)), dead_neurons(model, [test])


def run(full: bool = False) -> Outcome:
    seeds, steps = (5, 4000) if full else (3, 500)
    ways = {"without AP": 0.0, "with AP": 0.02}
    found = {name: [_run(seed, steps, q) for seed in range(seeds)] for name, q in ways.items()}
    ours: dict[str, object] = {}
    for name, runs in found.items():
        of = lambda part, runs=runs: mean(getattr(d, part) for _, d in runs)
        ours[name] = (
            f"{100 * mean(a for a, _ in runs):.2f} %, dead dynamic {of('dynamic'):.4f}, static {of('static'):.4f}"
        )
    pairs = list(zip(found["with AP"], found["without AP"]))
    better = [100 * (a - b) for (a, _), (b, _) in pairs]
    fewer = [b.dynamic - a.dynamic for (_, a), (_, b) in pairs]
    errors = [stdev(apart) / seeds**0.5 for apart in (better, fewer)]
    ours["gain in accuracy"] = f"{mean(better):+.2f} points, standard error {errors[0]:.2f}"
    ours["fewer dynamically dead"] = f"{mean(fewer):+.4f}, standard error {errors[1]:.4f}"
    return Outcome(ours, mean(better) > errors[0] and mean(fewer) > errors[1], RULE)
