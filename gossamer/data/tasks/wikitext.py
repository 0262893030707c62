"""WikiText-2 byte by byte, by a small Llama-style network or a small LSTM: no tokenizer, and a figure that needs none.

Shape suffixes: N windows, T bytes, D width, A heads, E width of a head, V the 256 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..text import wikitext2
from .task import Batch, Task, lot

WINDOW, TESTED = 128, 512


def wikitext_llama() -> Task:
    """Four blocks of width 128 on windows of 128 bytes, 811,000 weights in linear layers."""
    return _task("wikitext-llama", "WikiText-2 by bytes, Llama-style network", Llama)


def wikitext_lstm() -> Task:
    """One LSTM layer of width 256 on windows of 128 bytes, 393,000 weights in it and in the output."""
    return _task("wikitext-lstm", "WikiText-2 by bytes, LSTM", LSTM)


def _task(name: str, title: str, build: Callable[[], nn.Module]) -> Task:
    return Task(
        name=name,
        title=title,
        build=build,
        batch=_batch,
        loss=lambda out_NTV, next_NT: functional.cross_entropy(out_NTV.flatten(0, 1), next_NT.flatten()),
        measure=_measure,
        quality="bits per byte",
        higher_is_better=False,
        steps=2000,
        size=32,
        rate=2e-3,
    )


class Block(nn.Module):
    """Causal attention with rotary places, and a gated unit, each after an RMS norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, 8 * width // 3 // 16 * 16
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_NTD: Tensor) -> Tensor:
        y_NTD = self.norm1(x_NTD)
        split = lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # N A T E
        q, k, v = _turned(split(self.q(y_NTD))), _turned(split(self.k(y_NTD))), split(self.v(y_NTD))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x_NTD = x_NTD + self.o(mixed)
        y_NTD = self.norm2(x_NTD)
        return x_NTD + self.down(functional.silu(self.gate(y_NTD)) * self.up(y_NTD))


class Llama(nn.Module):
    """Bytes in, the next byte's logits out."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, bytes_NT: Tensor) -> Tensor:
        return self.out(self.norm(self.blocks(self.embed(bytes_NT))))


class LSTM(nn.Module):
    """Bytes in, the next byte's logits out; each window begins with an empty state."""

    def __init__(self, width: int = 256, embedding: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, embedding)
        self.lstm = nn.LSTM(embedding, width, batch_first=True)
        self.out = nn.Linear(width, 256)

    def forward(self, bytes_NT: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(bytes_NT))[0])


def _turned(x_NATE: Tensor) -> Tensor:
    """Rotary places: pairs (e, e + E/2) turned by t·10000^(−2e/E)."""
    half = x_NATE.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x_NATE.device) / half)
    angle_TE = torch.arange(x_NATE.shape[2], device=x_NATE.device)[:, None] * rates
    a, b = x_NATE.split(half, -1)
    return torch.cat([a * angle_TE.cos() - b * angle_TE.sin(), b * angle_TE.cos() + a * angle_TE.sin()], -1)


@lru_cache
def _windows(split: str) -> Tensor:
    """Windows of 129 bytes that overlap by one, [N, 129]."""
    text = torch.frombuffer(bytearray(wikitext2(split).encode()), dtype=torch.uint8)  # type: ignore[arg-type]
    return text.unfold(0, WINDOW + 1, WINDOW)


def _batch(step: int, size: int, seed: int) -> Batch:
    windows = _windows("train")
    part = windows[lot(len(windows), step, size, seed)].long()
    return part[:, :-1], part[:, 1:]


@torch.no_grad()
def _measure(model: nn.Module) -> dict[str, float]:
    """−log2 of the probability of each byte in the first windows of the test text, on average."""
    windows = _windows("test")[:TESTED].long()
    nats = [
        functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in windows.split(64)
    ]
    return {"bits per byte": sum(nats) / (windows.shape[0] * WINDOW) / math.log(2)}
