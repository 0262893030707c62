"""P100, Buehler, Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers, arXiv:2501.02393."""

from __future__ import annotations

from statistics import mean, stdev

import gossamer
from claims.outcome import Outcome
from claims.questions import Effort, Reader, accuracy, adapt_and_train, train
from gossamer.methods.finetuning.sparse_gin import sparse_gin
from gossamer.nn.gin import widest

CLAIM = "Graph networks along strong attention fine-tune a frozen model better than LoRA with as many parameters."
PAPER = "better generalization and training dynamics than LoRA (abstract)"
RULE = (
    "MiniLM on TREC questions, a graph network in each layer and LoRA of rank 8 on query and value, about as many "
    "numbers that learn (never more in the networks), both at a rate of 1e-3: mean test accuracy over three seeds is "
    "higher with the networks"
)
RANK, RATE = 8, 1e-3


def _low_rank(seed: int, effort: Effort) -> tuple[float, int]:
    model = Reader(seed)
    adapters = gossamer.adapt(model.encoder, "lora", rank=RANK, targets=["*query", "*value"], seed=seed)
    adapt_and_train(model, adapters, "trec", effort, seed=seed, rate=RATE)
    return accuracy(model, "trec", effort), adapters.trainable


def _graphs(seed: int, effort: Effort) -> tuple[float, int]:
    model = Reader(seed)
    graphs = sparse_gin(hidden=widest(384, 2 * RANK * (384 + 384)), seed=seed).on(model.encoder)
    train(model, "trec", effort, seed=seed, rate=RATE, learns=graphs.parameters())
    return accuracy(model, "trec", effort), graphs.trainable


def run(full: bool = False) -> Outcome:
    effort = Effort(400, 32, 500) if full else Effort(steps=100)
    ways = {"LoRA, rank 8": _low_rank, "graph networks": _graphs}
    found = {way: [fitted(seed, effort) for seed in range(3)] for way, fitted in ways.items()}
    ours: dict[str, object] = {
        way: f"{100 * mean(a for a, _ in rows):.2f} % ({', '.join(f'{100 * a:.1f}' for a, _ in rows)}), "
        f"{rows[0][1]} numbers learn"
        for way, rows in found.items()
    }
    lora, gin = ([a for a, _ in rows] for rows in found.values())
    apart = [100 * (a - b) for a, b in zip(gin, lora)]
    ours["graph networks over LoRA"] = f"{mean(apart):+.2f} points, standard error {stdev(apart) / 3**0.5:.2f}"
    ours["setting"] = f"{effort.steps} steps of {effort.batch} questions, {effort.tested} test questions"
    return Outcome(ours, mean(apart) > 0, RULE)
