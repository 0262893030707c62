"""Ranks: processes that train one model together must agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def mean_over_ranks(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The mean of each tensor over all processes, in place; the tensors as they are where one process runs alone.

    Args:
        tensors: by name.
        held: where processes may lack different names: a tensor of its shape and type for every name there could be,
            the same names everywhere. A name counts as zeros where it is missing, and is left out where all lack it.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return dict(tensors)
    here = dict(tensors) if held is None else _filled(tensors, held)
    for name in sorted(here):
        torch.distributed.all_reduce(here[name])
        here[name].div_(torch.distributed.get_world_size())
    return here


def _filled(tensors: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that any process brings, with zeros for those that this one lacks."""
    if not held:
        return {}
    names, device = sorted(held), next(iter(held.values())).device
    brought = torch.tensor([float(n in tensors) for n in names], device=device)
    torch.distributed.all_reduce(brought)
    known = [n for n, number in zip(names, brought.tolist()) if number]
    return {n: tensors[n] if n in tensors else torch.zeros_like(held[n]) for n in known}
