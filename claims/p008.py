"""P008, Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv:2102.04010."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.clothes import Effort, train
from claims.outcome import Outcome
from gossamer.attach import Handle, attach

CLAIM = (
    "SR-STE trains N:M networks at least as well as the plain straight-through estimator, and their supports settle."
)
PAPER = "ResNet-18 on ImageNet: 2:4 by SR-STE 71.2 % (official log); SAD lower than STE's throughout training (figure)"
RULE = (
    "at each of 2:4, 1:4, 1:8, mean accuracy over three seeds: SR-STE >= STE - 0.3 points (the test set resolves no "
    "less), and SAD lower; SGD, as λ = 2e-4 was chosen for it"
)
PATTERNS = ("2:4", "1:4", "1:8")


@dataclass(frozen=True)
class Sgd(Effort):
    """The paper's optimizer: momentum 0.9, weight decay 5e-5."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), self.rate, momentum=0.9, weight_decay=5e-5)


def _trained(effort: Effort, pattern: str, pull: float, seed: int) -> tuple[float, int]:
    """Accuracy, and SAD."""
    handles: list[Handle] = []

    def sparse(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
        layers = ["conv2", "hidden"]  # the first has one input channel, the last is the output head
        handles.append(attach(model, "sr_ste", pattern=pattern, pull=pull, optimizer=optimizer, targets=layers))
        return handles

    accuracy = train(8, effort, seed=seed, sparse=sparse)[1]
    moved = handles[0].state_dict()["moved"]  # the handle has let go of the model, and a report looks at that
    return accuracy, sum(moved.values())  # type: ignore[attr-defined]


def run(full: bool = False) -> Outcome:
    effort, seeds = Sgd(60000, 5, rate=0.05) if full else Sgd(12000, 2, rate=0.05), range(3)
    ours, held = {}, True
    for pattern in PATTERNS:
        plain, refined = ([_trained(effort, pattern, pull, s) for s in seeds] for pull in (0.0, 2e-4))
        a, b = (mean(r[0] for r in runs) for runs in (plain, refined))
        moved, settled = (mean(r[1] for r in runs) for runs in (plain, refined))
        ours[pattern] = f"STE {100 * a:.2f} %, SAD {moved:.0f}; SR-STE {100 * b:.2f} %, SAD {settled:.0f}"
        held = held and b >= a - 0.003 and settled < moved
    return Outcome(ours, held, RULE)
