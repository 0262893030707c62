"""Random pruning of a whole model: layers of equal shape draw different lots, and each run draws the same."""

from __future__ import annotations

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from gossamer.attach import attach
from gossamer.recipes.prune import prune


def model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))


def test_attached():
    a, b = (attach(model(), "random", density=0.2, seed=1, targets=["*"]).supports() for _ in range(2))
    assert a == b and all(s.count == 205 for s in a.values())
    assert a["0"] != a["1"] != a["2"]


def test_pruned():
    net = model()
    prune(net, "random", density=0.2, targets=["*"])
    assert not torch.equal(net[0].weight != 0, net[1].weight != 0)
