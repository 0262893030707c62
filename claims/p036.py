"""P036, Zhu & Gupta, To prune, or not to prune, arXiv:1710.01878.

Three small networks, with 10, 4 and 2 % of the large one's weights. A first version of this protocol trained for 561
steps, 168 of them after the ramp, and failed at all three (0.791 against 0.815, 0.621 against 0.789, 0.467 against
0.767). The one change since is a longer training, batches of 32: the ramp needs steps to recover in. The sizes and the
rule stayed.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import mean

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.clothes import Effort, Net, Sparse, train, weights
from claims.outcome import Outcome
from gossamer.attach import Handle, attach

CLAIM = "A large network pruned while it trains beats a small dense one with as many non-zero weights."
PAPER = "large-sparse consistently outperforms small-dense; up to 10x fewer non-zeros with minimal loss (abstract)"
RULE = "at each size, large-sparse has the higher mean test accuracy over the seeds, with no more non-zero weights"
LARGE = 16


def _count(model: nn.Module) -> int:
    return sum(int((p != 0).sum()) for p in model.parameters() if p.ndim > 1)


def _ramp(density: float, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Handle]:
    begin = steps // 10
    ramp = {"begin": begin, "until": begin + steps * 6 // 10, "every": 20}
    options = {"density": density, "total_steps": steps, **ramp}
    return [attach(model, "gradual_magnitude", optimizer=optimizer, targets=["*"], **options)]


def _sparse(small: int, effort: Effort) -> Sparse:
    size = {w: sum(map(math.prod, weights(Net(w)).values())) for w in (small, LARGE)}
    # A thousandth under, because each of the four layers rounds its own count.
    return partial(_ramp, 0.999 * size[small] / size[LARGE], effort.steps)


def run(full: bool = False) -> Outcome:
    effort = Effort(60000, 5, batch=32) if full else Effort(24000, 4, batch=32)
    ours, holds = {}, []
    for small in (5, 3, 2):
        runs = [
            (train(small, effort, seed=s), train(LARGE, effort, seed=s, sparse=_sparse(small, effort)))
            for s in range(3 if full else 2)
        ]
        dense, sparse = (mean(r[i][1] for r in runs) for i in (0, 1))
        counts = [max(_count(r[i][0]) for r in runs) for i in (0, 1)]
        ours[f"{counts[0]} weights"] = f"small-dense {dense:.4f}, large-sparse {sparse:.4f} with {counts[1]}"
        holds.append(sparse > dense and counts[1] <= counts[0])
    ours["large dense"] = f"{train(LARGE, effort, seed=0)[1]:.4f}"
    return Outcome(ours, all(holds), RULE)
