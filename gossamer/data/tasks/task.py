"""What a training task is made of, and the order in which samples come."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network to train, and how well it does.

    Args:
        title: for readers.
        build: a new network, drawn from torch's generator.
        batch: (step, size, seed) → inputs and targets: nothing else decides them, so a resumed run sees the same.
        loss: (outputs, targets) → scalar.
        measure: network → figures on data that it was not trained on, as fractions or plain numbers.
        quality: the figure that counts.
        higher_is_better: False for errors and perplexity.
        steps, size, rate: of a usual run: optimizer steps, samples a step, learning rate.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int, int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[nn.Module], dict[str, float]]
    quality: str
    higher_is_better: bool
    steps: int
    size: int
    rate: float


def lot(count: int, step: int, size: int, seed: int) -> Tensor:
    """The samples of a step out of `count`: each once an epoch, in an order of its own; what is left over rests."""
    epoch, place = divmod(step, max(count // size, 1))
    return _order(count, epoch, seed)[place * size : (place + 1) * size]


@torch.no_grad()
def named_right(model: nn.Module, x: Tensor, y_N: Tensor) -> float:
    """Share of the N samples whose class gets the largest output, a thousand at a time."""
    return sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y_N.split(1000))) / len(y_N)


@lru_cache(maxsize=4)
def _order(count: int, epoch: int, seed: int) -> Tensor:
    # The generator looks at 32 bits of its seed only, so the two are mixed.
    mixed = int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:4], "big")
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))
