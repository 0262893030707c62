"""Choosing a layer's support while it trains: by the kernel for pools of a few competitors where it serves, else torch.

N:M methods choose in every step, where torch's many passes would cost more than the layer's products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..core.budget import Keep, resolve
from ..core.sparsifier import Sparsifier, Stats
from ..core.support import Support
from ..score import magnitude
from . import by_kernel


def choose_both(rule: Sparsifier, w: Tensor, stats: Stats, step: int) -> tuple[Support, Support | None]:
    """The support of the forward pass, and that of the backward one where the rule has one of its own.

    They are those of `rule.choose(rule.score(w, stats))`, to the last entry.

    Args:
        w: finite.
    """
    scores = functools.cache(lambda: rule.score(w, stats))
    back = None if rule.backward is None else _choose(replace(rule, pattern=rule.backward), w, scores, step)
    return _choose(rule, w, scores, step), back


def _choose(rule: Sparsifier, w: Tensor, scores: Callable[[], Tensor], step: int) -> Support:
    budget = resolve(rule.budget, step)
    sizes = _blocks(rule, tuple(w.shape)) if isinstance(budget, Keep) and not rule.regroup else None
    if sizes is not None and w.numel() >= by_kernel.SMALL and not by_kernel.refusal():
        from ..kernels.cpu.few import best_of_few

        absolute = rule.score is magnitude
        x = w if absolute else scores()
        if _readable(x) and (absolute or bool(x.sum().isfinite())):  # a sum that is a number has no NaN in it
            kept = best_of_few(x.view(sizes), min(int(budget.k), sizes[1]), absolute=absolute)  # type: ignore[arg-type]
            return Support(kept.view(x.shape))
    return rule.choose(scores(), step=step)


def _blocks(rule: Sparsifier, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """The tensor as [blocks, competitors, pools side by side], where one axis competes and none is tied."""
    placed = rule.pattern.place(shape)
    at = [i for i, axis in enumerate(placed) if axis.role == "compete"]
    if len(at) != 1 or any(axis.role == "tied" for axis in placed) or not 2 <= placed[at[0]].length <= 8:
        return None
    lengths = [axis.length for axis in placed]
    return math.prod(lengths[: at[0]]), lengths[at[0]], math.prod(lengths[at[0] + 1 :])


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype is torch.float32 and x.is_contiguous()
