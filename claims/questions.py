"""Real sentences for claims about fine-tuning: MiniLM with a head of its own on TREC questions or film reviews.

Shape suffixes: B sentences, T tokens, D width, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.attach import Adapters
from gossamer.data import load_model, load_tokenizer, movie_reviews, trec
from gossamer.data.language import mean_pool

HEAD_RATE = 1e-2


TASKS = {"trec": 6, "reviews": 2}


@dataclass(frozen=True)
class Effort:
    """How much a run may cost: steps, sentences of each, and sentences that accuracy is measured on."""

    steps: int = 40
    batch: int = 16
    tested: int = 300


@dataclass(frozen=True)
class Sentences:
    """Token ids, unpadded (0 is the padding's), and labels."""

    ids: tuple[tuple[int, ...], ...]
    labels: Tensor

    def batch(self, chosen: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        ids = [torch.tensor(self.ids[i]) for i in chosen]
        padded_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": padded_BT, "attention_mask": (padded_BT != 0).long()}, self.labels[list(chosen)]


@cache
def sentences(task: str) -> dict[str, Sentences]:
    """Parts "train" and "test" of "trec" (6 classes) or "reviews" (2), as published or by hash, in drawn order."""
    found = trec() if task == "trec" else movie_reviews("rotten_tomatoes")
    return {"train": _part(found.train), "test": _part(found.test)}


def _part(found) -> Sentences:
    # Sources list their sentences in blocks.
    order = torch.randperm(len(found.texts), generator=torch.Generator().manual_seed(0)).tolist()
    ids = load_tokenizer("minilm")([found.texts[i] for i in order], truncation=True, max_length=48)["input_ids"]
    return Sentences(tuple(map(tuple, ids)), torch.as_tensor(found.labels)[order])


@cache
def _pretrained() -> nn.Module:
    return load_model("minilm")


class Reader(nn.Module):
    """MiniLM's mean of the last hidden states, and a linear head per task. No dropout: `eval()` throughout."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(_pretrained()).eval()
        torch.manual_seed(seed)
        self.heads = nn.ModuleDict({task: nn.Linear(384, classes) for task, classes in TASKS.items()})

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        return mean_pool(self.encoder(**batch).last_hidden_state, batch["attention_mask"])


def train(
    model: Reader,
    task: str,
    effort: Effort,
    *,
    seed: int,
    rate: float,
    learns: Iterable[nn.Parameter],
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    after: Callable[[], object] = lambda: None,
    prepare: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
) -> None:
    """Cross-entropy, AdamW, rates that fall to 0 after a tenth of the steps; the sentences depend on the seed alone."""
    head = model.heads[task]
    groups = [{"params": list(learns), "lr": rate}, {"params": list(head.parameters()), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    prepare(optimizer)
    warm = max(effort.steps // 10, 1)
    shape = lambda t: min((t + 1) / warm, (effort.steps - t) / (effort.steps - warm))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    data, rng = sentences(task)["train"], torch.Generator().manual_seed(seed)
    for _ in range(effort.steps):
        batch, labels = data.batch(torch.randint(len(data.labels), (effort.batch,), generator=rng).tolist())
        (functional.cross_entropy(head(model.embed(batch)), labels) + penalty()).backward()
        optimizer.step(), decay.step(), after()
        optimizer.zero_grad()


def adapt_and_train(model: Reader, adapters: Adapters, task: str, effort: Effort, *, seed: int, rate: float) -> None:
    """Fine-tune by the adapter in use."""
    rule = {"learns": adapters.parameters(), "penalty": adapters.penalty, "after": adapters.step}
    train(model, task, effort, seed=seed, rate=rate, **rule)


@torch.no_grad()
def embeddings(model: Reader, part: Sentences, count: int, batch: int = 50) -> Tensor:
    """Of the first sentences, in order; they run by length, so that little is padding."""
    order = sorted(range(count), key=lambda i: len(part.ids[i]))
    out_ND = torch.cat([model.embed(part.batch(order[i : i + batch])[0]) for i in range(0, count, batch)])
    return out_ND[torch.tensor(order).argsort()]


@torch.no_grad()
def accuracy(model: Reader, task: str, effort: Effort) -> float:
    """Share of the test sentences that the head names right."""
    data = sentences(task)["test"]
    named = model.heads[task](embeddings(model, data, effort.tested)).argmax(1)
    return float((named == data.labels[: effort.tested]).float().mean())
