"""Pull: what is added to gradients within an optimizer's step, such as what draws pruned weights to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..core.cut import add_where_, cut
from .sharded import own, part_of

Args = tuple[Any, ...]
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]
Terms = Callable[[], Iterable[tuple[Tensor, Tensor, float]]]


def pull(optimizer: torch.optim.Optimizer, strength: float, pairs: Pairs) -> RemovableHandle:
    """Before each of the optimizer's steps: grad += strength·(1 − m)⊙w, for every (w, m)."""
    return before_step(optimizer, lambda: ((w, ~part_of(m, w), strength) for w, m in pairs()))


def before_step(optimizer: torch.optim.Optimizer, terms: Terms) -> RemovableHandle:
    """Before each of the optimizer's steps: grad += strength·m⊙w, for every (w, m, strength) whose w has a gradient.

    m is this rank's part.

    So it counts once per step, however many batches, micro-batches or tied layers made the gradient, is not clipped,
    and then goes the way of every gradient: through momentum or Adam's moments. Where the step is given a closure that
    makes the gradients, it counts after each call of that.
    """

    @torch.no_grad()
    def add(optimizer: torch.optim.Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales within its step
        for w, kept, strength in terms():
            if w.grad is not None and scale is None:
                add_where_(own(w.grad), own(w), kept, strength)
            elif w.grad is not None:
                own(w.grad).add_(cut(own(w), kept) * scale, alpha=strength)

    def hook(optimizer: torch.optim.Optimizer, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            add(optimizer)
            return None

        def added() -> object:  # the step makes its gradients itself
            loss = closure()
            add(optimizer)
            return loss

        return (args[0], added, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    return optimizer.register_step_pre_hook(hook)
