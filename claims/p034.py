"""P034, Fang et al., Efficient N:M Sparse DNN Training Using Algorithm, Architecture, Dataflow, arXiv:2309.13015."""

from __future__ import annotations

from statistics import mean

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.clothes import Effort, train
from claims.outcome import Outcome
from gossamer.attach import Flops, Handle, attach

CLAIM = "N:M in both directions (2:8) halves the training work of a layer at little cost in accuracy."
PAPER = "2:8: 0.56 % less accuracy on average, 1.75 times as fast on their accelerator, of 2 possible (abstract)"
RULE = "three seeds: mean accuracy within 0.6 points of dense, and training FLOPs of the held layers exactly half"


def _trained(effort: Effort, seed: int) -> tuple[float, Flops]:
    spent: list[Handle] = []

    def sparse(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
        layers = ["conv2", "hidden"]  # the first has one input channel, the last ten outputs: neither a multiple of 8
        spent.append(attach(model, "bdwp", pattern="2:8", optimizer=optimizer, targets=layers))
        return spent

    accuracy = train(8, effort, seed=seed, sparse=sparse)[1]
    forward, backward, dense = spent[0].state_dict()["spent"]  # type: ignore[misc]
    return accuracy, Flops(forward, backward, dense)


def run(full: bool = False) -> Outcome:
    effort, seeds = Effort(60000, 8) if full else Effort(18000, 3), range(3)
    dense = mean(train(8, effort, seed=s)[1] for s in seeds)
    runs = [_trained(effort, s) for s in seeds]
    sparse, work = mean(a for a, _ in runs), runs[0][1].share
    ours = {
        "dense": f"{100 * dense:.2f} %",
        "2:8 both ways": f"{100 * sparse:.2f} %, {100 * (dense - sparse):.2f} points behind",
        "training FLOPs of the held layers": f"{100 * work:.1f} % of dense",
    }
    return Outcome(ours, dense - sparse <= 0.006 and work == 0.5, RULE)
