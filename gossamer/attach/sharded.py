"""Sharded parameters (FSDP2): each rank holds a part, masks and scores are of the whole.

DTensor is known by what it can do: importing it would double the time that `import gossamer` takes.
"""

from __future__ import annotations

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """True if this rank holds a part of the tensor only."""
    return hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """All of a tensor, gathered from the ranks that share it; every rank must ask."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def own(x: Tensor) -> Tensor:
    """This rank's part, in place: what is written there is written to `x`."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def part_of(mask: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a mask that every rank holds whole, cut as `like` is, without talking."""
    if not is_sharded(like):
        return mask
    from torch.distributed.tensor import distribute_tensor

    return own(distribute_tensor(mask, like.device_mesh, like.placements, src_data_rank=None))  # type: ignore[attr-defined]
