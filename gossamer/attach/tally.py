"""What each layer keeps, and what came and went, in numbers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core.support import counted
from .report import LayerReport, dead


class Tally:
    """Counts by layer. What a change brought stays on the device until somebody looks.

    What a mask keeps is remembered, for counting waits for the device, and counted anew once the mask was written to,
    as by loading a state, or swapped for another.
    """

    def __init__(self) -> None:
        self._grown: dict[str, Tensor | int] = {}
        self._moved: dict[str, Tensor | int] = {}
        self._counted: dict[str, tuple[Tensor, int, int]] = {}

    def change(self, name: str, grown: Tensor | int, moved: Tensor | int) -> None:
        """So many links have come in, and so many came or went."""
        self._grown[name] = grown
        self._moved[name] = self._moved.get(name, 0) + moved

    def count(self, name: str, mask: Tensor) -> int:
        """Entries that the mask of this name keeps."""
        held = self._counted.get(name)
        if held is None or held[0] is not mask or held[1] != mask._version:
            held = self._counted[name] = (mask, mask._version, int(counted(mask)))
        return held[2]

    def report(self, name: str, kept: Tensor, groups: int) -> LayerReport:
        """One layer's line; `kept` has outputs first."""
        grown, moved = int(self._grown.get(name, 0)), int(self._moved.get(name, 0))
        return LayerReport(name, int(counted(kept)), kept.numel(), grown, moved, *dead(kept, groups))

    def state_dict(self) -> dict[str, object]:
        """Plain numbers."""
        parts = {"grown": self._grown, "moved": self._moved}
        return {part: {n: int(v) for n, v in counts.items()} for part, counts in parts.items()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        self._grown, self._moved = dict(state["grown"]), dict(state["moved"])  # type: ignore[call-overload]
