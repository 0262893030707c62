"""P089, Zhang et al., Lottery Jackpots Exist in Pre-trained Models, arXiv:2104.08700."""

from __future__ import annotations

import copy
from statistics import mean, stdev

import torch
from torch import nn
from torch.nn import functional

import gossamer
from claims.clothes import Effort, accuracy, tensors, train
from claims.outcome import Outcome

CLAIM = "A mask searched for in a trained network, with no weight trained, is nearly as good as fine-tuned pruning."
PAPER = "ResNet-32 on CIFAR-10, 90 % zeros, 30 epochs of search: 93.70 % (table of the official code)"
RULE = (
    "Fashion-MNIST, width 16, 10 % of all weights but the output layer's kept, as many epochs each, three seeds: mean "
    "test accuracy of the searched mask is at most 2 points below that of magnitude pruning with fine-tuning"
)
KEPT, HEAD = 0.1, ["out"]


def _after(model: nn.Module, optimizer: torch.optim.Optimizer, handle, effort: Effort, seed: int) -> float:
    """Train what the handle lets learn, rate falling by a cosine to 0; returns test accuracy."""
    x, y, _, _ = tensors()
    rng = torch.Generator().manual_seed(seed)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, effort.steps)
    for _ in range(effort.epochs):
        order = torch.randperm(effort.images, generator=rng)
        for part in order[: effort.steps // effort.epochs * effort.batch].split(effort.batch):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step(), decay.step(), handle.step()
    handle.remove()
    return accuracy(model)


def _searched(dense: nn.Module, effort: Effort, seed: int, swap: float | None) -> float:
    """The paper's optimizer."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    found = {"total_steps": effort.steps, "swap": swap, "optimizer": optimizer, "skip": HEAD}
    return _after(model, optimizer, gossamer.attach(model, "lottery_jackpots", density=KEPT, **found), effort, seed)


def _tuned(dense: nn.Module, effort: Effort, seed: int) -> tuple[float, float]:
    """Magnitude pruning in one pool: before and after fine-tuning by the optimizer the dense network was trained by."""
    model = copy.deepcopy(dense)
    optimizer = torch.optim.Adam(model.parameters(), effort.rate)
    handle = gossamer.attach(model, "global_magnitude", density=KEPT, optimizer=optimizer, skip=HEAD)
    cut = accuracy(model)
    return cut, _after(model, optimizer, handle, effort, seed)


def run(full: bool = False) -> Outcome:
    before, after = (Effort(60000, 8), Effort(60000, 8)) if full else (Effort(18000, 3), Effort(18000, 3))
    rows: dict[str, list[float]] = {n: [] for n in ("dense", "cut", "searched", "searched, unrestricted", "fine-tuned")}
    for seed in range(3):
        dense, value = train(16, before, seed=seed)
        cut, tuned = _tuned(dense, after, seed)
        found, free = (_searched(dense, after, seed, swap) for swap in (None, 1.0))
        for row, v in zip(rows.values(), (value, cut, found, free, tuned)):
            row.append(v)
    apart = [a - b for a, b in zip(rows["searched"], rows["fine-tuned"])]
    ours = {name: f"{100 * mean(row):.2f} %" for name, row in rows.items()}
    ours["searched over fine-tuned"] = (
        f"{100 * mean(apart):+.2f} points, standard error {100 * stdev(apart) / 3**0.5:.2f}"
    )
    return Outcome(ours, mean(apart) >= -0.02, RULE)
