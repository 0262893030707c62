"""A handle under which pruned weights shrink by a share after each step, and are cut at a given one."""

from __future__ import annotations

import torch

from ..core.cut import faded
from ..core.shrink import Attenuate
from .handle import Handle
from .sharded import own, part_of


class AttenuatingHandle(Handle):
    """Before the cut masks only say which weights shrink; from then on supports are fixed and pruned weights are 0."""

    @property
    def _rule(self) -> Attenuate:
        assert isinstance(self.sparsifier.shrink, Attenuate)
        return self.sparsifier.shrink

    @property
    def _cuts(self) -> bool:
        return self.steps >= self._rule.until

    def step(self) -> None:
        super().step()
        if self._cuts:
            return
        with torch.no_grad():
            for t in self.targets:
                original = self._original(t)
                kept = part_of(self._mask(t).mask, original)
                own(original).copy_(faded(own(original), kept, self._rule.ratio))
