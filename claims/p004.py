"""P004, Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv:2202.02643."""

from __future__ import annotations

from functools import partial
from statistics import mean

import torch
from torch import nn
from torch.nn import functional

import gossamer.methods  # noqa: F401 - fills the registry
from claims.clothes import Effort, Net, train
from claims.outcome import Outcome
from gossamer.attach import Handle, attach
from gossamer.data.tasks.clothes import tensors

CLAIM = "Trained from a random pruning at initialisation, the gap to the dense network shrinks as width grows."
PAPER = "as networks grow wider, random pruning quickly grows to match its dense equivalent (abstract)"
RULE = "the mean gap over the seeds shrinks from each of three widths to the next, ERK densities, 10 % kept"
ALLOCATIONS = ("erk", "er", "uniform", "snip")  # "snip": its densities, the support by lot
SAMPLES = 100  # images that SNIP's ratios are taken from: about ten per class, as its code has


def _static(rule: str, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
    x, y, _, _ = tensors()
    shown = {"data": (x[:SAMPLES], y[:SAMPLES]), "loss": functional.cross_entropy}
    options = {"density": 0.1, "allocation": rule, "seed": seed, "targets": ["*"], **shown}
    return [attach(model, "static", optimizer=optimizer, **options)]


def _accuracy(width: int, effort: Effort, seeds: int, rule: str | None = None) -> float:
    """Mean over the seeds: dense, or with densities by this rule."""
    sparse = lambda s: None if rule is None else partial(_static, rule, s)
    return mean(train(width, effort, seed=s, sparse=sparse(s))[1] for s in range(seeds))


def run(full: bool = False) -> Outcome:
    effort, seeds = (Effort(60000, 8), 4) if full else (Effort(18000, 3), 2)
    ours, falling = {}, []
    for width in (4, 8, 16):
        dense = _accuracy(width, effort, seeds)
        gaps = {rule: dense - _accuracy(width, effort, seeds, rule) for rule in ALLOCATIONS}
        told = ", ".join(f"{rule} {100 * gap:.2f}" for rule, gap in gaps.items())
        ours[f"width {width}"] = f"dense {dense:.4f}; gap in points, by allocation: {told}"
        falling.append(gaps["erk"])
    ours["weights at width 4, 8, 16"] = [sum(p.numel() for p in Net(w).parameters() if p.ndim > 1) for w in (4, 8, 16)]
    return Outcome(ours, falling[0] > falling[1] > falling[2], RULE)
