"""Ranks: processes that train one model together must agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def mean_over_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each tensor over all processes, in place; the tensors as they are where one process runs alone."""
    if tensors and torch.distributed.is_available() and torch.distributed.is_initialized():
        for name in sorted(tensors):
            torch.distributed.all_reduce(tensors[name])
            tensors[name].div_(torch.distributed.get_world_size())
    return dict(tensors)
