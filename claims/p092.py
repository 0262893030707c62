"""P092, Konstantaropoulos et al., Neuro-inspired Ensemble-to-Ensemble Communication Primitives, arXiv:2508.14140."""

from __future__ import annotations

from statistics import mean, stdev

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.clothes import Effort, Sparse, train
from claims.outcome import Outcome
from gossamer.attach import Handle, attach

CLAIM = "A network of groups, dense within and sparse between, 75 % zeros, rewired by Hebb's rule, beats the dense one."
PAPER = "up to 75 % sparsity while improving accuracy by up to 4.3 % on benchmarks including Fashion-MNIST (abstract)"
RULE = (
    "three hidden layers of 512 on Fashion-MNIST, Adam, three seeds: eight groups by turns (mixer), 25.6 % kept, links "
    "moved ten times by |correlation|, are above dense in mean test accuracy by more than the standard error of the "
    "paired difference"
)
WIDTH, NARROW = 512, 200  # a dense network of 200 has as many weights as the sparse one of 512
KEPT = (1 + 0.15 * 7) / 8


def _build(width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (784, width, width):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _ways(effort: Effort, seed: int) -> dict[str, Sparse]:
    """What is held against each other; all but the output layer is sparse."""

    def way(method: str, **options: object) -> Sparse:
        def sparse(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
            how = {"density": KEPT, "allocation": "uniform", "seed": seed, "skip": ["7"], **options}
            return [attach(model, method, optimizer=optimizer, total_steps=effort.steps, **how)]

        return sparse

    every = effort.steps // 10
    return {
        "groups, moved by Hebb": way("g2gnet", grouping="mixer", every=every),
        "groups, moved at random": way("g2gnet", grouping="mixer", every=every, grow="random"),
        "groups, fixed": way("g2gnet", grouping="mixer", every=0),
        "random links, fixed": way("static"),
    }


def run(full: bool = False) -> Outcome:
    effort, seeds = (Effort(60000, 5, rate=1e-3), 5) if full else (Effort(12000, 4, rate=1e-3), 3)
    names = list(_ways(effort, 0))
    trained = lambda width, s, sparse=None: train(width, effort, seed=s, sparse=sparse, build=_build)[1]
    found = {n: [trained(WIDTH, s, _ways(effort, s)[n]) for s in range(seeds)] for n in names}
    found["dense"] = [trained(WIDTH, s) for s in range(seeds)]
    found["dense, as many weights"] = [trained(NARROW, s) for s in range(seeds)]
    ours = {n: f"{100 * mean(values):.2f} %" for n, values in found.items()}
    apart = [a - b for a, b in zip(found[names[0]], found["dense"])]
    error = stdev(apart) / seeds**0.5
    ours["groups, moved by Hebb, over dense"] = f"{100 * mean(apart):.2f} points, standard error {100 * error:.2f}"
    return Outcome(ours, mean(apart) > error, RULE)
