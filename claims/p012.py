"""P012, Zimmer, Spiegel & Pokutta, Sparse Model Soups, arXiv:2306.16788."""

from __future__ import annotations

from statistics import mean

import torch
from torch import nn
from torch.nn import functional

from claims.clothes import Effort, accuracy, tensors, train
from claims.outcome import Outcome
from gossamer.recipes.soup import Soup, sparse_soup

CLAIM = "The average of networks retrained from one pruned network beats the best of them, and is as sparse."
PAPER = "averaging these models significantly enhances generalization over their individual counterparts (abstract)"
RULE = (
    "at the last phase, 5 % kept, the soup's mean test accuracy over the seeds is above that of the best members, "
    "and it keeps no more weights"
)
MEMBERS = 3


def _soup(seed: int, before: Effort, after: Effort) -> tuple[Soup, nn.Module]:
    """Three phases of three members that see the images in another order. Nothing is chosen by the test images."""
    x, y, _, _ = tensors()
    model, _ = train(8, before, seed=seed)

    def retrain(model: nn.Module, handle, member: int) -> float:
        rng = torch.Generator().manual_seed(100 * seed + member)
        optimizer = torch.optim.Adam(model.parameters(), after.rate)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, after.steps)
        for _ in range(after.epochs):
            for part in torch.randperm(after.images, generator=rng).split(after.batch):
                if len(part) < after.batch:
                    continue
                optimizer.zero_grad()
                functional.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step(), decay.step(), handle.step()
        return accuracy(model)

    return sparse_soup(model, retrain, density=0.05, phases=3, members=MEMBERS, evaluate=accuracy), model


def run(full: bool = False) -> Outcome:
    before, after = (Effort(60000, 8), Effort(60000, 4)) if full else (Effort(18000, 3), Effort(18000, 1))
    seeds = 4 if full else 3
    best, mixed, counts, ours = [], [], [], {}
    for seed in range(seeds):
        soup, model = _soup(seed, before, after)
        *members, value = soup.phases[-1].values
        best.append(max(members)), mixed.append(value)
        kept = sum(int((m.weight != 0).sum()) for n, m in model.named_modules() if n in soup.supports)
        counts.append((kept, sum(s.count for s in soup.supports.values())))
        ours[f"seed {seed}"] = f"members {', '.join(f'{100 * m:.2f}' for m in members)} %, soup {100 * value:.2f} %"
    ours["mean of the best members"], ours["mean of the soups"] = (
        f"{100 * mean(best):.2f} %",
        f"{100 * mean(mixed):.2f} %",
    )
    ours["weights kept"] = counts[0][0]
    return Outcome(ours, mean(mixed) > mean(best) and all(a <= b for a, b in counts), RULE)
