"""ALPS as its paper's algorithm reads: float64, an inverse per iteration, one row at a time. Unstructured and N:M."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_alps(
    w: Tensor,
    gram: Tensor,
    *,
    keep: int = 0,
    group: tuple[int, int] | None = None,
    damping: float = 0.01,
    refit: int = 10,
) -> Tensor:
    """New weights. `keep` entries of the whole matrix, or `group` = (kept, of)."""
    k = w.shape[1]
    g = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(k, dtype=torch.float64)
    scale = g.diagonal().sqrt()
    h, scaled = g / torch.outer(scale, scale), w.double() * scale
    mask = _admm(scaled, h, keep, group)
    rows = [_row_cg(start, full, h, m, refit) for start, full, m in zip(mask[0], scaled, mask[1])]
    return torch.stack(rows) / scale


def _project(x: Tensor, keep: int, group: tuple[int, int] | None) -> Tensor:
    squares = x.square().reshape(1, -1) if group is None else x.square().reshape(-1, group[1])
    count = keep if group is None else group[0]
    order = squares.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(squares, dtype=torch.bool).scatter(1, order, True).view_as(x)


def _admm(w: Tensor, h: Tensor, keep: int, group: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    rho, moved = 0.1, False
    d, v = w.clone(), torch.zeros_like(w)
    before = _project(w, keep, group)
    for step in range(1, 301):
        b = torch.linalg.solve(h + rho * torch.eye(len(h), dtype=h.dtype), w @ h - v + rho * d, left=False)
        mask = _project(b + v / rho, keep, group)
        d = torch.where(mask, b + v / rho, 0)
        v = v + rho * (b - d)
        if step % 3 == 0:
            change = float((mask & ~before).sum()) / max(float(mask.sum()), 1)
            before = mask
            if step >= 30 and change < 3e-4:
                break
            if 0 < change <= 0.005 and not moved:
                rho, d, v = rho / 5, w.clone(), torch.zeros_like(w)
                continue
            moved = moved or change > 0.005
            rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
    return torch.where(mask, b, 0), mask


def _row_cg(b: Tensor, w: Tensor, h: Tensor, mask: Tensor, steps: int) -> Tensor:
    on = mask.nonzero().flatten()
    part, target = h[on][:, on], (w @ h)[on]
    x = b[on].clone()
    r = target - part @ x
    p = r.clone()
    for _ in range(steps):
        if float(p @ part @ p) <= 0:
            break
        a = (r @ r) / (p @ part @ p)
        x, old = x + a * p, r
        r = r - a * (part @ p)
        p = r + (r @ r) / (old @ old) * p
    return torch.zeros_like(b).index_put((on,), x)
