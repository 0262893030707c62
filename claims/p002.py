"""P002, Farahani, Random Search as a Baseline for Sparse Neural Network Architecture Search, arXiv:2403.08265."""

from __future__ import annotations

from statistics import mean, stdev

import torch
from torch import nn
from torch.nn import functional

from claims.clothes import Effort, accuracy, tensors
from claims.outcome import Outcome
from gossamer.recipes.random_search import random_search

CLAIM = "The best of many random sparse networks at initialisation is no better, once trained, than one nobody chose."
PAPER = (
    "networks found by random search neither perform better nor converge more efficiently than random ones (abstract)"
)
RULE = (
    "784-256-256-10 on Fashion-MNIST, best of 100 draws against another of them from the same start, trained on the "
    "same batches, ten seeds, at a half and at a tenth of the nodes: the 90 % interval of the mean paired difference "
    "in test accuracy, by Student's t, lies within 0.5 points of 0, which is a test of equivalence at 5 %"
)
MARGIN, T90 = 0.005, {5: 2.132, 10: 1.833}  # 95th percentile of t with n - 1 degrees of freedom
EARLY = 50  # steps after which convergence is looked at


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    linear = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(nn.Flatten(), *linear)


def _pair(seed: int, density: float, effort: Effort) -> tuple[list[tuple[float, float]], float]:
    """(early, final) accuracy of the best draw and of a random one; how far the best leads at the start, in loss."""
    x, y, _, _ = tensors()
    look = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:1000]

    def train(model: nn.Module, handle) -> tuple[float, float]:
        rng = torch.Generator().manual_seed(seed)
        optimizer = effort.optimizer(model)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, effort.steps)
        early = 0.0
        for _ in range(effort.epochs):
            order = torch.randperm(effort.images, generator=rng)
            for part in order[: effort.steps // effort.epochs * effort.batch].split(effort.batch):
                optimizer.zero_grad()
                functional.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step(), decay.step(), handle.step()
                early = accuracy(model) if handle.steps == EARLY else early
        return early, accuracy(model)

    model = _network(seed)
    value = lambda m: -functional.cross_entropy(m(x[look]), y[look]).item()
    found = random_search(model, value, x[:1], density=density, draws=100, seed=seed)
    other = 0 if found.best else 1  # draws are by lot, so the first is as random as any
    runs = [found.train(model, train, draw=draw).result for draw in (found.best, other)]
    return runs, found.values[found.best] - found.values[other]  # type: ignore[return-value]


def run(full: bool = False) -> Outcome:
    effort, seeds = (Effort(60000, 4), 10) if full else (Effort(24000, 2), 10)
    ours, held = {}, True
    for density in (0.5, 0.1):
        pairs, leads = zip(*(_pair(seed, density, effort) for seed in range(seeds)))
        apart = [best[1] - other[1] for best, other in pairs]
        early = [best[0] - other[0] for best, other in pairs]
        half = T90[seeds] * stdev(apart) / seeds**0.5
        best, other = (mean(p[i][1] for p in pairs) for i in (0, 1))
        ours[f"{density:.0%} of the nodes"] = (
            f"best {100 * best:.2f} %, random {100 * other:.2f} %, apart {100 * mean(apart):+.2f} points, "
            f"90 % interval {100 * (mean(apart) - half):+.2f} to {100 * (mean(apart) + half):+.2f}"
        )
        ours[f"{density:.0%} of the nodes, start and step {EARLY}"] = (
            f"loss lower by {mean(leads):.3f}; accuracy apart {100 * mean(early):+.2f} points, "
            f"standard error {100 * stdev(early) / seeds**0.5:.2f}"
        )
        held = held and abs(mean(apart)) + half < MARGIN
    return Outcome(ours, held, RULE)
