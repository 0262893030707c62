"""P025, Yildirim et al., Continual Learning with Dynamic Sparse Training, arXiv:2308.14831."""

from __future__ import annotations

from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional

from claims.outcome import Outcome
from gossamer.core import Cosine
from gossamer.data.tasks.clothes import Net, tensors
from gossamer.recipes.continual import Continual

CLAIM = "Tasks learned in turn by dynamic sparse training start best from ERK at low sparsity, from uniform at high."
PAPER = "at low sparsity ERK uses the backbone more efficiently, at high sparsity uniform is more reliable (abstract)"
RULE = (
    "Fashion-MNIST in five tasks of two classes, mean accuracy over the tasks after the last one, averaged over four "
    "growths: over the seeds, ERK is above uniform with 50 % kept per task, and uniform above ERK with 10 %, each by "
    "more than the standard error of the paired difference"
)
GROWTH = (("set", "random"), ("set", "unfired"), ("rigl", "gradient"), ("rigl", "momentum"))
TASKS, BATCH, LOW, HIGH = 5, 64, 0.5, 0.1


def _part(x: Tensor, y: Tensor, task: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels 0 and 1 of one task."""
    chosen = (y // 2 == task).nonzero()[:most, 0]
    return x[chosen], y[chosen] - 2 * task


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = Net(8)
    net.out = nn.Linear(net.out.in_features, 2)
    return net


def _learn(learner: Continual, task: int, images: int, epochs: int, how: dict[str, object]) -> None:
    """By the official code's Adam and schedules; a twelfth of the steps lies between moves."""
    x, y = _part(*tensors()[:2], task, images)
    steps = epochs * (images // BATCH)
    optimizer = torch.optim.Adam(learner.model.parameters(), 1e-3)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
    moves = {"every": steps // 12, "until": steps, "fraction": Cosine(0.5, 0.005, steps=steps)}
    handle = learner.begin(optimizer=optimizer, total_steps=steps, **moves, **how)
    for _ in range(epochs):
        for part in torch.randperm(images)[: images // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(learner.model(x[part]), y[part]).backward()
            optimizer.step(), handle.step(), decay.step()
    learner.end()


@torch.no_grad()
def _accuracy(learner: Continual) -> float:
    """Mean over the tasks, each recalled."""
    parts = [_part(*tensors()[2:], task) for task in range(TASKS)]
    return mean(float((learner.recall(k)(x).argmax(1) == y).float().mean()) for k, (x, y) in enumerate(parts))


def _run(seed: int, density: float, allocation: str, growth: tuple[str, str], size: tuple[int, int]) -> float:
    learner = Continual(_net(seed), skip=["out"], seed=100 * seed)
    method, grow = growth
    how = {"method": method, "grow": grow, "density": density, "allocation": allocation}
    for task in range(TASKS):
        _learn(learner, task, *size, how)
    return _accuracy(learner)


def run(full: bool = False) -> Outcome:
    seeds, size = (range(6), (6000, 4)) if full else (range(3), (1000, 4))
    ours, held = {}, True
    for density, better in ((LOW, "erk"), (HIGH, "uniform")):
        found = {
            (rule, growth): [_run(s, density, rule, growth, size) for s in seeds]
            for rule in ("erk", "uniform")
            for growth in GROWTH
        }
        worse = "uniform" if better == "erk" else "erk"
        for growth in GROWTH:
            told = ", ".join(f"{rule} {100 * mean(found[rule, growth]):.2f} %" for rule in ("erk", "uniform"))
            ours[f"{density:.0%} kept, growth {growth[1]}"] = told
        by_seed = {r: [mean(found[r, g][s] for g in GROWTH) for s in range(len(seeds))] for r in ("erk", "uniform")}
        apart = [a - b for a, b in zip(by_seed[better], by_seed[worse])]
        error = stdev(apart) / len(apart) ** 0.5
        ours[f"{density:.0%} kept, {better} over {worse}"] = (
            f"{100 * mean(apart):.2f} points, standard error {100 * error:.2f}"
        )
        held = held and mean(apart) > error
    return Outcome(ours, held, RULE)
