"""What a handle tells: of its layers, and of the work that training has taken."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..core.shrink import hard
from ..core.sparsifier import Sparsifier
from .masked import Masked
from .meter import Meter
from .report import LayerReport, TrainingReport
from .tally import Tally
from .targets import Target


class Account:
    """The part of a handle that looks and never touches. What it counts is in the handle's state."""

    model: nn.Module
    sparsifier: Sparsifier
    targets: tuple[Target, ...]
    steps: int
    _tally: Tally
    _meter: Meter
    _left: float

    def _mask(self, target: Target) -> Masked:
        raise NotImplementedError

    def report(self) -> TrainingReport:
        """Kept entries, churn and dead neurons of each layer, and the work done so far."""
        layers = tuple(self._layer_report(t) for t in self.targets)
        return TrainingReport(self.sparsifier.name, self.steps, layers, self._meter.flops())

    @property
    def density(self) -> float:
        """Fraction kept over all layers together."""
        return sum(self._counts().values()) / max(sum(self._meter.sizes.values()), 1)

    def observe(self, *args: object, **kwargs: object) -> None:
        """Run the model once on a batch to count each layer's positions, as `report` needs where it is compiled.

        Raises:
            TargetError: no layer that is held was reached, or the model's own code is compiled (`model.compile()`).
        """
        self._meter.observe(self.model, self.targets, args, kwargs)

    @property
    def _cuts(self) -> bool:
        """What is pruned is 0 and learns no more."""
        return self.sparsifier.shrink is hard

    def _counts(self) -> dict[str, int]:
        """Kept entries of each layer."""
        return {t.name: self._tally.count(t.name, self._mask(t).mask) for t in self.targets}

    def _work(self) -> tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int]]:
        """Entries that the last step multiplied with: forward, by the inputs, by the weights."""
        if self._left:
            return self._meter.sizes, self._meter.sizes, self._meter.sizes
        kept, two_way = self._counts(), self.sparsifier.backward is not None
        back = lambda t: self._tally.count(f"{t.name}, backward", self._mask(t).back)
        by_inputs = {t.name: back(t) for t in self.targets} if two_way else kept
        return kept, by_inputs, self._learning()

    def _learning(self) -> Mapping[str, int]:
        """Entries whose gradient the last step computed."""
        dense = not self._cuts or any(self._mask(t).listening for t in self.targets)
        return self._meter.sizes if dense else self._counts()

    def _layer_report(self, target: Target) -> LayerReport:
        kept, groups = target.turned(self._mask(target).mask), getattr(target.module(self.model), "groups", 1)
        return self._tally.report(target.name, kept, groups)
