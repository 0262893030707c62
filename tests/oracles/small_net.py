"""A network 12-24-8 with its derivatives by hand, for twins that must not share a line with what they check."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

import gossamer

SIZES = {"0": (24, 12), "2": (8, 24)}
LR, MOMENTUM = 0.1, 0.9


def net(kind: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 24), kind(), nn.Linear(24, 8)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, (x[:, :8] * 2).sin()


def numbers(model: nn.Module) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    both = [{n: getattr(model[int(n)], part).detach().numpy().copy() for n in SIZES} for part in ("weight", "bias")]
    return both[0], both[1]


def gradients(w, b, data, temperature=1.0):
    """∂/∂w and ∂/∂b of mean (out/T − y)²."""
    x, y = (z.numpy() for z in data)
    h = np.tanh(x @ w["0"].T + b["0"])
    out = (h @ w["2"].T + b["2"]) / temperature
    d_out = 2 * (out - y) / out.size / temperature
    d_h = (d_out @ w["2"]) * (1 - h * h)
    return {"0": d_h.T @ x, "2": d_out.T @ h}, {"0": d_h.sum(0), "2": d_out.sum(0)}


def tied_runs(method: str, **options: object) -> Iterator[tuple[nn.Module, object]]:
    """Two layers with one weight after five steps that keep 16 entries: as they are, and compiled."""
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    for model, compiled in ((copy.deepcopy(tied), False), (copy.deepcopy(tied), True)):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        handle = gossamer.attach(model, method, density=0.25, optimizer=opt, **options)
        torch._dynamo.reset()
        called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for t in range(5):
            opt.zero_grad()
            called(torch.randn(6, 8, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            opt.step()
            handle.step()
        assert [r.kept for r in handle.report()] == [16] and model[2].weight.equal(model[0].weight)
        yield model, handle
