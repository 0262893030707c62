"""Merging: a weight takes its deltas in, and gives them back to the very bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import TargetError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PRUNED = 0.1  # a weight with a larger share of zeros is taken for a pruned one


@dataclass(frozen=True)
class Undo:
    """What a merge overwrote: where, and with it the values that stood there."""

    where: Tensor
    values: Tensor

    def __call__(self, weight: Tensor) -> None:
        """Put the values back.

        Raises:
            TargetError: the weight's number type changed since, so its bits cannot come back.
        """
        if weight.dtype != self.values.dtype:
            raise TargetError(
                f"the model was merged in {self.values.dtype} and is in {weight.dtype} now; unmerge before converting"
            )
        with torch.no_grad():
            weight[self.where.to(weight.device)] = self.values.to(weight.device)


@dataclass(frozen=True)
class Merged:
    """What a merge did to one layer: entries written, and zeros before and after."""

    layer: str
    written: int
    zeros_before: int
    zeros_after: int


@torch.no_grad()
def write(layer: str, weight: Tensor, new: Tensor, zeros: str) -> tuple[Undo, Merged]:
    """Copy `new` into `weight`, and remember what it replaced.

    Args:
        zeros: "keep" = zeros stay zeros, "fill" = they may go, "refuse" = they may not where the weight is pruned.

    Raises:
        TargetError: zeros of a pruned weight would be filled, and `zeros` is "refuse".
    """
    zero = weight == 0
    if zeros == "keep":
        new = torch.where(zero, weight, new)
    lost = int((zero & (new != 0)).sum())
    if zeros == "refuse" and lost and int(zero.sum()) > PRUNED * weight.numel():
        raise TargetError(
            f"merging would fill {lost} of the {int(zero.sum())} zeros of layer {layer!r}; say zeros='fill' to let "
            "them go, zeros='keep' to cut the change instead, or train with adapt(..., keep_zeros=True)"
        )
    bits = _BITS[weight.element_size()]
    where = weight.detach().view(bits) != new.detach().view(bits)
    undo = Undo(where, weight[where].clone())
    weight.copy_(new)
    return undo, Merged(layer, int(where.sum()), int(zero.sum()), int((weight == 0).sum()))
