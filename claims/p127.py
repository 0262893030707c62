"""P127, Frankle & Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635: the paper's LeNet-300-100 on digits."""

from __future__ import annotations

from functools import lru_cache
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.nn import functional

from claims.outcome import Outcome
from gossamer.data.images import mnist
from gossamer.recipes.lottery_ticket import lottery_ticket

CLAIM = "A ticket with at most a fifth of the weights matches the dense network; from another random start it does not."
PAPER = (
    "tickets of less than 10-20% of the size reach comparable accuracy; reinitialized they fall behind (abstract, 2)"
)
RULE = (
    "with 17 % kept, mean test accuracy over the seeds is at most 0.2 points below the dense network's, and that of "
    "the same supports from a new random start is below the ticket's by more than the standard error of the difference"
)
KEPT = 0.17


def lenet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


@lru_cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = mnist()
    scale = lambda x: (x.float().flatten(1) / 255 - 0.1307) / 0.3081  # the set's mean and standard deviation
    return scale(data.train.images), data.train.labels, scale(data.test.images), data.test.labels


def _accuracy(model: nn.Module) -> float:
    _, _, x, y = _digits()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def _run(seed: int, steps: int) -> dict[str, float]:
    """Accuracies of the dense network, the ticket, and the ticket's supports from a new start."""
    x, y, _, _ = _digits()

    def train(model: nn.Module, handle) -> float:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).repeat(1 + steps * 60 // len(x))
        optimizer = torch.optim.Adam(model.parameters(), 1.2e-3)
        for step in range(handle.steps, steps):
            part = order[60 * step : 60 * (step + 1)]
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            handle.step()
        return _accuracy(model)

    model = lenet(seed)
    ticket = lottery_ticket(model, train, density=KEPT, per_round=0.3)
    elsewhere = ticket.train(model, train, state=lenet(1000 + seed).state_dict())
    return {"dense": ticket.cycles[0].result, "ticket": ticket.cycles[-1].result, "new start": elsewhere.result}


def run(full: bool = False) -> Outcome:
    seeds, steps = (5, 5000) if full else (3, 1000)
    runs = [_run(seed, steps) for seed in range(seeds)]
    means = {name: mean(r[name] for r in runs) for name in runs[0]}
    apart = [r["ticket"] - r["new start"] for r in runs]
    error = stdev(apart) / seeds**0.5
    ours = {name: f"{100 * value:.2f} %" for name, value in means.items()}
    ours["ticket over a new start"] = f"{100 * mean(apart):.2f} points, standard error {100 * error:.2f}"
    verdict = means["ticket"] >= means["dense"] - 0.002 and mean(apart) > error
    return Outcome(ours, verdict, RULE)
