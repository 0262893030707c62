"""A handle for supports that are explored around: weights beside them learn before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.cut import cut_
from ..core.errors import TargetError
from ..core.explore import Explore, explored
from ..core.sparsifier import require_finite
from ..core.support import Support
from .handle import Handle
from .masked import Masked
from .pull import before_step
from .recurrent import put_behind
from .sharded import is_sharded
from .targets import Target, sharers, slots


class Explored(Masked):
    """A mask for the forward pass, and a wider one, `learning`, for the gradient; both live in `state_dict`."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__(kept)
        self.register_buffer("learning", kept.clone())

    def forward(self, original: Tensor) -> Tensor:
        return explored(original, Support(self.mask), Support(self.learning))


class ExploringHandle(Handle):
    """Forward pass by the support A; gradient, penalty and optimizer slots in B ⊃ A. Outside A values stay as they are.

    So pruned weights are not zero in the parameter, only in the layer's `weight`, in `remove()`'s model and in what is
    saved from it; outside B nothing moves but by the optimizer's own weight decay.
    """

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Look after this optimizer's slots from now on, and add the penalty in its steps.

        Raises:
            TargetError: it does not train the held weights, or FSDP2 has sharded them.
        """
        if any(is_sharded(self._original(t)) for t in self.targets):
            raise TargetError(f"{self.sparsifier.name!r} adds to whole gradients; it cannot train sharded weights")
        super().follow(optimizer)

    def learning(self) -> dict[str, Support]:
        """What the gradient reaches (B), of every layer, in the layout its weight is stored in."""
        return {t.name: Support(self._mask(t).learning) for t in self.targets}

    def _hold(self, target: Target) -> None:
        mask = Explored(torch.ones_like(target.stored(self.model), dtype=torch.bool))
        for module, tensor in sharers(self.model, target):
            put_behind(mask, module, tensor)

    @property
    def _explore(self) -> Explore:
        assert self.sparsifier.explore is not None
        return self.sparsifier.explore

    def _choose(self) -> Any:
        factor = self._explore.density / self.sparsifier.final_density()
        for t in self.targets:
            w, rule = self._view(t), self.per_layer[t.name]
            require_finite(w, f"the weight of layer {t.name!r}")
            wide = rule.at_density(min(1.0, factor * rule.final_density()))
            learning = wide.choose(rule.score(w, self._stats(t)), step=self.steps).kept
            self._mask(t).learning.copy_(t.turned(learning))
        return super()._choose()

    def _take(self, target: Target, kept: Tensor) -> None:
        """Whatever is kept learns, also where B was chosen without it: by other groups of rows, or not at all."""
        super()._take(target, kept)
        self._mask(target).learning.logical_or_(kept)

    def _pull(self) -> RemovableHandle | None:
        penalty = self._explore.penalty
        return before_step(self.optimizer, self._drawn) if self.optimizer is not None and penalty else None

    def _drawn(self) -> Iterator[tuple[nn.Parameter, Tensor, float]]:
        """The gradient of the penalty: what is kept draws itself, what is explored draws 1/D times as hard."""
        for t in self.targets:
            w, mask, penalty = self._original(t), self._mask(t), self._explore.penalty
            yield w, mask.mask, penalty
            # In an empty layer nothing learns.
            yield w, mask.learning > mask.mask, penalty / (self.per_layer[t.name].final_density() or 1.0)

    def _project(self) -> None:
        """Every optimizer slot is zero where nothing learns, or momentum would move what no gradient reaches."""
        with torch.no_grad():
            for t in self.targets:
                for slot in slots(self.optimizer, self._original(t)):
                    cut_(slot, self._mask(t).learning)

    def _learning(self) -> Mapping[str, int]:
        return {t.name: self._tally.count(f"{t.name}, learning", self._mask(t).learning) for t in self.targets}
