"""SparseGPT as its paper's algorithm reads, in float64 and with no thought for speed. The oracle and the baseline.

Order of work as in the official procedure: H⁻¹ by Cholesky, its upper Cholesky factor, blocks of 128 columns, the mask
of a block from all its rows at once (or of an N:M group when its first column is reached), one column at a time,
the rest of the matrix after each block. Counts are exact, as ours are, or by the official threshold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def naive_sparsegpt(
    w: Tensor,
    gram: Tensor,
    *,
    density: float = 0.5,
    group: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
    threshold: bool = False,
    bits: int | None = None,
) -> Tensor:
    """New weights. `group` = (kept, of). `threshold` = the official cut, which keeps one entry less per block.

    `bits`: kept weights are rounded to their row's range in so many bits, zero included, before the next column's turn.
    """
    w, h = w.clone(), gram.clone().to(w.dtype)
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    columns = w.shape[1]
    if bits is not None:
        least, most = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        scale = (most - least) / (2**bits - 1)
        zero = (-least / scale).round()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, diagonal = w[:, start:stop].clone(), u[start:stop, start:stop]
        errors = torch.zeros_like(part)
        cut = torch.zeros_like(part, dtype=torch.bool)
        if group is None:
            cut = _cut_block(part, diagonal, density, start, columns, threshold)
        for j in range(stop - start):
            if group and j % group[1] == 0:
                worth = part[:, j : j + group[1]] ** 2 / diagonal.diagonal()[j : j + group[1]] ** 2
                cut[:, j : j + group[1]] = _lowest(worth, group[1] - group[0])
            new = part[:, j].clone()
            if bits is not None:
                new = (scale * ((new / scale).round() + zero).clamp(0, 2**bits - 1)) - scale * zero
            new[cut[:, j]] = 0
            errors[:, j] = (part[:, j] - new) / diagonal[j, j]
            part[:, j:] -= errors[:, j : j + 1].matmul(diagonal[j : j + 1, j:])
            part[:, j] = new
        w[:, start:stop] = part
        w[:, stop:] -= errors.matmul(u[start:stop, stop:])
    return w


def _cut_block(part: Tensor, diagonal: Tensor, density: float, start: int, columns: int, threshold: bool) -> Tensor:
    worth = part**2 / diagonal.diagonal() ** 2
    if threshold:
        return worth <= worth.flatten().sort().values[int(worth.numel() * (1 - density))]
    rows, width = part.shape
    whole = math.floor(density * rows * columns + 0.5)
    kept = [math.floor(whole * end / columns + 0.5) for end in (start, start + width)]
    return _lowest(worth.view(1, -1), worth.numel() - (kept[1] - kept[0])).view_as(part)


def _lowest(worth: Tensor, n: int) -> Tensor:
    """The n lowest of each row; of equals the later ones."""
    order = worth.flip(1).argsort(dim=1, stable=True)[:, :n]
    return torch.zeros_like(worth, dtype=torch.bool).scatter(1, order, True).flip(1)
