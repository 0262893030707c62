"""Ranks: processes that train one model together must agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as _ProcessGroup
ProcessGroup: TypeAlias = "_ProcessGroup"


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of a tensor over the group's processes, in place: the same bits on each of them."""
    torch.distributed.all_reduce(x, group=group)
    return x


def least_over_ranks(x: int, group: ProcessGroup) -> int:
    """The least of a whole number over the group's processes."""
    held = torch.tensor(x)
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MIN, group=group)
    return int(held)


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
