"""P015, Thangarasa et al., Sparse Iso-FLOP Transformations for Maximizing Training Efficiency, arXiv:2303.11525."""

from __future__ import annotations

from statistics import mean, stdev

import torch
from torch import nn

from claims.clothes import Effort, train
from claims.outcome import Outcome
from gossamer.attach import Handle, attach
from gossamer.recipes.sparse_ift import sparse_ift

CLAIM = "At the FLOPs of the dense network, a wider one with as many more zeros, trained by RigL, is more accurate."
PAPER = "Sparse-IFT ResNet-18 on ImageNet +3.5 points at the dense network's FLOPs and hyper-parameters (abstract)"
RULE = (
    "three convolutions with batch norms, width 8, on Fashion-MNIST, 75 % zeros, RigL, three seeds, same steps: "
    "Sparse-Wide is above the dense network in mean test accuracy by more than the standard error of the paired "
    "difference; the other families are reported"
)
DENSITY = 0.25
FAMILIES = ("wide", "parallel", "factorized", "doped")
ENDS = ["0", "13"]  # first and last layer, which the paper leaves alone


def _dense(width: int) -> nn.Module:
    blocks, sizes = [], (1, width, 2 * width, 4 * width)
    for k, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        pool = nn.MaxPool2d(2) if k < 2 else nn.AdaptiveAvgPool2d(1)
        blocks += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), pool]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width, 10))


def _iso(family: str, effort: Effort, seed: int, width: int) -> tuple[float, int]:
    """Test accuracy, and weights multiplied with per position, summed over the layers."""
    done = {}

    def build(width: int) -> nn.Module:
        model = _dense(width)
        done["iso"] = sparse_ift(model, family, torch.ones(1, 1, 28, 28), density=DENSITY, skip=_skipped(family))
        return model

    def sparse(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
        where = {"targets": done["iso"].densities, "allocation": done["iso"].densities}
        return [attach(model, "rigl", optimizer=optimizer, total_steps=effort.steps, every=50, seed=seed, **where)]

    model, _ = trained = train(width, effort, seed=seed, build=build, sparse=sparse)
    fixed = sum(layer.fixed for layer in done["iso"].layers)
    layers = [m.weight for n, m in model.named_modules() if n in done["iso"].densities]
    return trained[1], fixed + sum(int(w.count_nonzero()) for w in layers)


def _skipped(family: str) -> list[str]:
    """Wide changes what the ends read and write."""
    return [] if family == "wide" else ENDS


def run(full: bool = False) -> Outcome:
    effort, seeds = Effort(60000, 8) if full else Effort(18000, 3), 3
    dense = [train(8, effort, seed=seed, build=_dense)[1] for seed in range(seeds)]
    ours, gains = {"dense": f"{100 * mean(dense):.2f} %"}, {}
    for family in FAMILIES:
        runs = [_iso(family, effort, seed, 8) for seed in range(seeds)]
        apart = [r[0] - d for r, d in zip(runs, dense)]
        gains[family] = mean(apart), stdev(apart) / seeds**0.5
        ours[family] = (
            f"{100 * mean(r[0] for r in runs):.2f} %, {100 * gains[family][0]:+.2f} points, "
            f"standard error {100 * gains[family][1]:.2f}; weights used {runs[0][1]}"
        )
    gain, error = gains["wide"]
    return Outcome(ours, gain > error, RULE)
