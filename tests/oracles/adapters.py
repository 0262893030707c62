"""Small models for adapters, and what each method of site "delta" is called with on them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# What a method needs besides its defaults on models this small.
OPTIONS: dict[str, dict[str, object]] = {
    "gs_lora": {"rank": 2, "strength": 0.1},
    "loca": {"coefficients": 9},
    "lora": {"rank": 2},
    "pst": {"total_steps": 4, "density": 0.5, "rank": 1},
    "s2ft": {"density": 0.25},
    "sara": {"threshold": 0.1, "again": 2},
    "sparse_spectral": {"rank": 2, "every": 2},
}


class Block(nn.Module):
    """A residual feed-forward block with the names that Llama uses."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.relu(self.up_proj(x)))


def blocks(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).to(dtype)


def batch(model: nn.Module) -> Tensor:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    return x.to(next(model.parameters()).dtype)


def train(model: nn.Module, parameters: Iterable[Tensor], *, steps: int = 3, after=lambda optimizer: None) -> None:
    """A few large steps, so that every number that learns moves."""
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    for _ in range(steps):
        (model(batch(model)).float() - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after(optimizer)
