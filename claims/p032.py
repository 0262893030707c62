"""P032, Darji, Investigating Sparsity in Recurrent Neural Networks, arXiv:2407.20601."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional

from claims.outcome import Outcome
from gossamer.attach import hold
from gossamer.data import reber, ucr_crop
from gossamer.data.tasks.task import named_right
from gossamer.recipes.random_graphs import (
    GraphStatistics,
    barabasi_albert,
    correlations,
    graph_statistics,
    recurrent_supports,
    watts_strogatz,
)
from gossamer.recipes.regain import Recovery, regain

CLAIM = "Trained RNNs, GRUs and LSTMs lose 60 % of their weights and have their accuracy back after one epoch."
PAPER = "often more than 60 % can be removed, and one epoch of retraining recovers the accuracy (section 6)"
RULE = (
    "at 40 % kept of input-to-hidden and hidden-to-hidden weights together, every kind of network is, on both sets and "
    "as a mean over the seeds, within one point of its dense accuracy after one epoch; correlations are reported only"
)
UNITS = 50
KINDS = {
    "RNN-tanh": partial(nn.RNN, nonlinearity="tanh"),
    "RNN-ReLU": partial(nn.RNN, nonlinearity="relu"),
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
}
DENSITIES, POINT = (0.4, 0.1), 0.01


@dataclass(frozen=True)
class Data:
    """Training and test sequences with their classes; `letters` of an alphabet, or 0 for numbers."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    letters: int
    rate: float

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


@lru_cache
def grammar() -> Data:
    """Is a string made by the Reber grammar, or is one letter wrong? 8,000 strings to train on, 2,000 to test."""
    held = reber(10000, seed=0)
    return Data(held.letters[:8000], held.valid[:8000], held.letters[8000:], held.valid[8000:], 8, 1e-3)


@lru_cache
def crop() -> Data:
    """UCR Crop, 24 classes, standardised; every second test series."""
    held = ucr_crop()
    std, middle = torch.std_mean(held.train.series)
    scale = lambda x: ((x - middle) / std).unsqueeze(-1)
    test = scale(held.test.series[::2]), held.test.labels[::2]
    return Data(scale(held.train.series), held.train.labels, *test, 0, 3e-3)


class Reader(nn.Module):
    """Letters or numbers in, the last state of one recurrent layer classified."""

    def __init__(self, kind: str, data: Data) -> None:
        super().__init__()
        self.embed = nn.Embedding(data.letters, UNITS, padding_idx=0) if data.letters else nn.Identity()
        self.rnn = KINDS[kind](UNITS if data.letters else 1, UNITS, batch_first=True)
        self.out = nn.Linear(UNITS, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(x))[0][:, -1])


def accuracy(data: Data, model: nn.Module) -> float:
    """Share of the test sequences named correctly."""
    return named_right(model, data.test_x, data.test_y)


def epochs(data: Data, seed: int, model: nn.Module, handle=None) -> Iterator[None]:
    """Adam, batches of 64, gradients clipped at 5 as in the thesis; an epoch for each value."""
    lots = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), data.rate)
    while True:
        for part in torch.randperm(len(data.y), generator=lots).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(data.x[part]), data.y[part]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            if handle is not None:
                handle.step()
        yield


def trained(data: Data, kind: str, seed: int, most: int, graph: Tensor | None = None) -> nn.Module:
    """A network after `most` epochs, its recurrent weights a graph's if one is given."""
    torch.manual_seed(seed)
    model = Reader(kind, data)
    handle = hold(model, supports=recurrent_supports(model, graph)) if graph is not None else None
    for _ in zip(range(most), epochs(data, seed, model, handle)):
        pass
    return handle.remove() if handle else model


def recovered(data: Data, kind: str, seed: int, most: int) -> tuple[Recovery, float]:
    """A dense network, pruned to each density and trained on; and its accuracy after one more epoch unpruned."""
    model, go_on = trained(data, kind, seed, most), partial(epochs, data, 100 + seed)
    score = partial(accuracy, data)
    found = regain(model, go_on, score, densities=DENSITIES, most=3, tolerance=POINT, targets=["rnn"])
    next(go_on(model))
    return found, score(model)


def told(found: list[Recovery], longer: list[float]) -> str:
    """Per density: accuracy when pruned, after the first epoch, and the epochs needed, seed by seed."""
    rows = []
    for at in zip(*(r.rows for r in found)):
        needed = ", ".join("-" if r.epochs is None else str(r.epochs) for r in at)
        first = mean(first_epoch(r) for r in at)
        rows.append(f"{at[0].density:.0%} kept: {100 * mean(r.pruned for r in at):.1f} → {100 * first:.1f} [{needed}]")
    dense, more = 100 * mean(r.dense for r in found), 100 * mean(longer)
    return f"dense {dense:.1f} (one epoch later {more:.1f}); " + "; ".join(rows)


def first_epoch(row) -> float:
    """The score after one epoch; where nothing was lost, none was trained."""
    return row.curve[0] if row.curve else row.pruned


def worlds() -> list[tuple[str, Tensor]]:
    """Six small worlds and six scale-free graphs of several densities."""
    small = [(k, p) for k in (4, 10, 20) for p in (0.05, 0.6)]
    free = [(m, s) for m in (2, 5, 12) for s in (0, 1)]
    named = [(f"WS {k} {p}", watts_strogatz(UNITS, k, p, seed=i)) for i, (k, p) in enumerate(small)]
    return named + [(f"BA {m}", barabasi_albert(UNITS, m, seed=s)) for m, s in free]


def structures(kind: str, *, seeds: int, most: int) -> str:
    """Rank correlations of accuracy on Crop with the graph's figures, over graphs; means over seeds."""
    data, graphs = crop(), worlds()
    figures: list[GraphStatistics] = [graph_statistics(g) for _, g in graphs]
    scores = [mean(accuracy(data, trained(data, kind, s, most, g)) for s in range(seeds)) for _, g in graphs]
    dense = mean(accuracy(data, trained(data, kind, s, most)) for s in range(seeds))
    parts = [f"{n} {c.rank:+.2f} [{c.low:+.2f}, {c.high:+.2f}]" for n, c in correlations(figures, scores).items()]
    by = lambda name: 100 * mean(s for s, (n, _) in zip(scores, graphs) if n.startswith(name))
    return f"dense {100 * dense:.1f}, WS {by('WS'):.1f}, BA {by('BA'):.1f}; {', '.join(parts)}"


SETS: dict[str, tuple[Callable[[], Data], int]] = {"Reber": (grammar, 8), "Crop": (crop, 5)}


def judged(name: str, kind: str, full: bool) -> tuple[str, bool]:
    """What became of one kind of network on one set, and whether the rule holds for it."""
    data, most = SETS[name]
    pairs = [recovered(data(), kind, s, 2 * most if full else most) for s in range(5 if full else 3)]
    found = [r for r, _ in pairs]
    good = mean(first_epoch(r.rows[0]) for r in found) >= mean(r.dense for r in found) - POINT
    return told(found, [more for _, more in pairs]), good


def run(full: bool = False) -> Outcome:
    rows = {(name, kind): judged(name, kind, full) for name in SETS for kind in KINDS}
    ours = {f"{name}, {kind}, accuracy % [epochs to come back]": text for (name, kind), (text, _) in rows.items()}
    for kind in KINDS:
        ours[f"graphs on Crop, {kind}"] = structures(kind, seeds=5 if full else 1, most=8 if full else 2)
    return Outcome(ours, all(good for _, good in rows.values()), RULE)
