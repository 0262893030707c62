"""P004, Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv:2202.02643."""

from __future__ import annotations

from functools import partial
from statistics import mean

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.clothes import Effort, Net, train, weights
from claims.outcome import Outcome
from gossamer.attach import Handle, attach
from gossamer.core import allocation

CLAIM = "Trained from a random pruning at initialisation, the gap to the dense network shrinks as width grows."
PAPER = "as networks grow wider, random pruning quickly grows to match its dense equivalent (abstract)"
RULE = "the mean gap over the seeds shrinks from each of three widths to the next, ERK densities, 10 % kept"


def _static(rule: str, density: float, seed: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
    densities = allocation(rule)(weights(model), density)
    return [
        attach(model, "random", optimizer=optimizer, targets=[name], density=d, seed=100 * seed + i)
        for i, (name, d) in enumerate(densities.items())
    ]


def _gap(width: int, effort: Effort, *, seeds: int, rule: str = "erk") -> tuple[float, float]:
    """Mean dense accuracy, and how far random pruning stays behind it."""
    dense = mean(train(width, effort, seed=s)[1] for s in range(seeds))
    sparse = mean(train(width, effort, seed=s, sparse=partial(_static, rule, 0.1, s))[1] for s in range(seeds))
    return dense, dense - sparse


def run(full: bool = False) -> Outcome:
    effort, seeds = (Effort(60000, 8), 4) if full else (Effort(18000, 3), 2)
    widths = (4, 8, 16)
    gaps = {w: _gap(w, effort, seeds=seeds) for w in widths}
    ours = {f"width {w}": f"dense {d:.4f}, gap {100 * g:.2f} points" for w, (d, g) in gaps.items()}
    ours["weights at width 4, 8, 16"] = [sum(p.numel() for p in Net(w).parameters() if p.ndim > 1) for w in widths]
    falling = [gaps[w][1] for w in widths]
    return Outcome(ours, falling[0] > falling[1] > falling[2], RULE)
