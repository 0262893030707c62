"""Delta: a small trainable change of one frozen weight. What every adapter is made of.

How a paper moves in: a module with one subclass of `Delta` that says what it adds to a weight, and a function,
registered with `@method(..., site="delta")`, that returns an `Adapter`, which makes one such delta for each layer.
Everything else (freezing, switching, merging, fusing, files) is shared.

Shape suffixes: O outputs, I inputs, R rank, B positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import TargetError, unknown

KINDS: dict[str, type[Delta]] = {}


class Delta(nn.Module):
    """The change of one weight: w + change(w). Its numbers are parameters and buffers, all small.

    A subclass names its `kind`, takes its tensors and `constants()` as arguments of its constructor, under the names
    they have in `state_dict`, so that a file holds all that builds it again, and says `change`. The rest is as needed.

    Weights come outputs first, [O, I, ...], whatever the layer's own layout is.
    """

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **_: object) -> None:
        super().__init_subclass__()
        if cls.kind in KINDS:
            raise TargetError(f"a delta of kind {cls.kind!r} exists already: {KINDS[cls.kind].__name__}; pick another")
        if cls.kind:
            KINDS[cls.kind] = cls

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.keep_zeros = False

    def change(self, w: Tensor) -> Tensor:
        """What is added to w, in its shape and dtype; differentiable by the delta's own parameters."""
        raise NotImplementedError

    def product(self, x_BI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
        """y = x·(w + change(w))ᵀ + bias of a linear layer, where that can be had without the sum; else None."""
        return None

    def advance(self, w: Tensor) -> None:
        """What moves after an optimizer's step of the frozen weight w's change; `steps` counts it already."""

    @classmethod
    def settle(cls, deltas: Mapping[str, Delta], optimizer: torch.optim.Optimizer | None) -> None:
        """What deltas of this kind do together once all have advanced, by layer and adapter; for learning rates and
        momenta there is the optimizer, if `step` was given it.

        Raises:
            TargetError: the kind needs the optimizer, and there is none.
        """

    def penalty(self, w: Tensor) -> Tensor | None:
        """What the method adds to the loss for this weight."""
        return None

    def constants(self) -> dict[str, object]:
        """Arguments of the constructor that are not tensors; JSON must be able to say them."""
        return {}

    def low_rank(self, w: Tensor) -> tuple[Tensor, Tensor] | None:
        """(B_OR, A_RI) with change(w) = B·A exactly, where there are such; peft reads these."""
        return None

    @classmethod
    def joined(cls, parts: Sequence[tuple[Delta, float]]) -> Delta:
        """One delta that changes a weight by Σ factor·change.

        Raises:
            TargetError: deltas of this kind cannot be joined.
        """
        raise TargetError(
            f"deltas of kind {cls.kind!r} cannot be fused into one; run them side by side with use({{name: factor}})"
        )

    def effect(self, w: Tensor) -> Tensor:
        """The change that the layer sees: `change`, cut to the weight's support where zeros are to stay."""
        return self.change(w) * (w != 0) if self.keep_zeros else self.change(w)


@dataclass(frozen=True)
class Place:
    """Where a delta goes.

    Args:
        model: the whole one.
        layer: the layer's name.
        number: the layer's, counted from 0.
        of: how many layers the adapter changes.
        keep_zeros: the change will be cut to entries that are not 0.
    """

    model: nn.Module
    layer: str
    number: int = 0
    of: int = 1
    keep_zeros: bool = False


@dataclass(frozen=True)
class Adapter:
    """A method of sparse fine-tuning: what it makes for each layer.

    Args:
        name: the method's.
        make: (weight, outputs first; its place) → delta.
        targets: layers that it changes unless others are named, as globs; empty = all but the output head.
    """

    name: str
    make: Callable[[Tensor, Place], Delta]
    targets: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def kind(name: str) -> type[Delta]:
    """The class of deltas of this kind.

    Raises:
        UnknownName: there is none.
    """
    if name not in KINDS:
        raise unknown("kind of delta", name, KINDS)
    return KINDS[name]


def trained(values: Tensor) -> nn.Parameter:
    """A delta's numbers as its parameter; in float32 where the weight is narrower, or small steps would be lost."""
    narrow = values.dtype in (torch.bfloat16, torch.float16)
    return nn.Parameter(values.detach().float() if narrow else values.detach().clone())
