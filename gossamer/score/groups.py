"""Groups: links within a group of neurons come before links between groups, and lots decide among equals.

Shape suffixes: M outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import Stats
from gossamer.core.errors import UnknownName, near

from .random import Random

WAYS = ("index", "interleaved", "mixer", "random")


@dataclass(frozen=True)
class Groups:
    """1[group of the output = group of the input] + a lot from [0, 1).

    So a budget of d·M·K links takes the d·M·K/G links within the G groups first, and draws the rest between them.

    Args:
        number: G, groups on each side, of sizes that differ by one at the most. A side with fewer neurons sets the
            number for both.
        by: which neurons are together: "index" = neighbours; "interleaved" = every G-th; "random" = drawn anew for each
            side of each layer; "mixer" = neighbours and every G-th in turn, layer by layer (`stats["place"]`, the
            layer's number; 0 where it is missing).
        seed: of all lots.

    Raises:
        UnknownName: no such way.

    Example:
        >>> (Groups(2, by="interleaved")(torch.ones(2, 4), {}) >= 1).tolist()
        [[True, False, True, False], [False, True, False, True]]
    """

    number: int
    by: str = "index"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise UnknownName(f"neurons are grouped by {', '.join(WAYS)}, got {self.by!r}; {near(self.by, WAYS)}")

    def __call__(self, w: Tensor, stats: Stats) -> Tensor:
        number = max(1, min(self.number, *w.shape[:2]))
        outputs_M, inputs_K = (self._members(w.shape[side], number, side, stats).to(w.device) for side in (0, 1))
        same_MK = (outputs_M[:, None] == inputs_K).reshape(w.shape[:2] + (1,) * (w.ndim - 2))
        return Random(self.seed)(w, stats) + same_MK

    def _members(self, size: int, number: int, side: int, stats: Stats) -> Tensor:
        """The group of every neuron of one side."""
        neuron = torch.arange(size)
        turn = int(stats["place"]) % 2 if "place" in stats else 0
        if self.by == "interleaved" or (self.by == "mixer" and turn):
            return neuron % number
        together = neuron * number // max(size, 1)
        if self.by != "random":
            return together
        return together[Random(self.seed + 1 + side)(neuron.float(), stats).argsort()]
