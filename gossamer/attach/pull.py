"""Pull: what is added to gradients within an optimizer's step, such as what draws pruned weights to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .sharded import own, part_of

Args = tuple[Any, ...]
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def pull(optimizer: torch.optim.Optimizer, strength: float, pairs: Pairs) -> RemovableHandle:
    """Before each of the optimizer's steps: grad += strength·(1 − m)⊙w, for every (w, m) that has a gradient."""
    pruned = lambda: ((w, own(w).masked_fill(part_of(m, w), 0)) for w, m in pairs() if w.grad is not None)
    return before_step(optimizer, strength, pruned)


def before_step(optimizer: torch.optim.Optimizer, strength: float, terms: Pairs) -> RemovableHandle:
    """Before each of the optimizer's steps: grad += strength·x, for every (w, x); x is this rank's part.

    So it counts once per step, however many batches, micro-batches or tied layers made the gradient, is not clipped,
    and then goes the way of every gradient: through momentum or Adam's moments. Where the step is given a closure that
    makes the gradients, it counts after each call of that.
    """

    @torch.no_grad()
    def add(optimizer: torch.optim.Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales within its step
        for weight, x in terms():
            own(weight.grad).add_(x if scale is None else x * scale, alpha=strength)

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
