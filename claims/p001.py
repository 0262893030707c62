"""P001, Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training, arXiv:2402.04744."""

from __future__ import annotations

from functools import partial
from statistics import mean, stdev

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.clothes import Effort, train
from claims.outcome import Outcome
from gossamer.attach import Handle, attach
from gossamer.data.tasks.clothes import Transformer

CLAIM = "At high sparsity (1:16) a transformer trained with a decaying mask or structure beats one trained by SR-STE."
PAPER = "up to 2 % better in vision, 5 % in language, above 80 % zeros (abstract)"
RULE = (
    "transformer of width 64, two blocks' linear layers at 1:16, Adam, three seeds: both decaying methods are above "
    "SR-STE in mean accuracy by more than the standard error of their paired difference"
)
METHODS = ("sr_ste", "decaying_mask", "decaying_structure")


def _sparse(method: str, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
    layers = ["blocks.*"]  # patches are 49 pixels, and the output head stays dense
    return [attach(model, method, pattern="1:16", total_steps=steps, optimizer=optimizer, targets=layers)]


def run(full: bool = False) -> Outcome:
    effort, seeds = Effort(60000, 5, rate=1e-3) if full else Effort(12000, 3, rate=1e-3), range(3)
    build = lambda width: Transformer(width, depth=2)
    found = {
        m: [train(64, effort, seed=s, sparse=partial(_sparse, m, effort.steps), build=build)[1] for s in seeds]
        for m in METHODS
    }
    ours = {m: f"{100 * mean(values):.2f} %" for m, values in found.items()}
    held = True
    for m in METHODS[1:]:
        apart = [a - b for a, b in zip(found[m], found["sr_ste"])]
        error = stdev(apart) / len(apart) ** 0.5
        ours[f"{m} over sr_ste"] = f"{100 * mean(apart):.2f} points, standard error {100 * error:.2f}"
        held = held and mean(apart) > error
    return Outcome(ours, held, RULE)
