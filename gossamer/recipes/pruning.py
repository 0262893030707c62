"""One run of `prune`: layer after layer, with or without data, from the last finished one on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from ..attach.calibrate import Arrival, Batch, stream
from ..attach.journal import Journal
from ..attach.shelf import shelf_of
from ..attach.spool import Spool
from ..attach.start import first_supports
from ..attach.statistics import Collector
from ..attach.targets import Target
from ..core.ranks import ProcessGroup
from ..core.shrink import hard
from ..core.sparsifier import Sparsifier, Stats
from ..score import magnitude, salt
from ..score.trial import Trial

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerResult:
    """What became of one layer.

    Args:
        shape: of the weight, outputs first.
        kept: non-zero entries now.
        seconds: time spent on this layer's own statistics and pruning.
        resumed: taken from an earlier run's journal.
        note: what a reader should know about it: too few tokens, or that no batch reached it.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    seconds: float
    resumed: bool = False
    note: str = ""

    @property
    def density(self) -> float:
        """Fraction kept."""
        return self.kept / max(math.prod(self.shape), 1)


class Run:
    """One call of `prune`: which layer comes next, and what becomes of it."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        per_layer: dict[str, Sparsifier],
        journal: Journal | None,
        offload: bool,
        progress: Progress | None,
        spool: Spool | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.model, self.targets, self.per_layer = model, targets, per_layer
        self.journal, self.offload, self.progress = journal, offload, progress
        self.spool, self.group = spool, group
        self.results: list[LayerResult] = []
        self.notes: dict[str, str] = {}
        self.shelf = shelf_of(model)
        if offload:
            for t in targets:
                self._to_disk(t)

    def with_data(self, data: Iterable[Batch], sequential: str) -> list[str]:
        """Statistics first, of one layer or of a block; then its layers change and the passes go on."""
        collect = Collector(next(iter(self.per_layer.values())).needs, self.group)
        measured: dict[str, tuple[Stats, float]] = {}

        def visit(arrival: Arrival) -> None:
            began, target = time.perf_counter(), arrival.target
            if not self.finished(target):
                stats = collect(arrival, target.module(self.model))
                measured[target.name] = stats, time.perf_counter() - began

        def leave(targets: Sequence[Target]) -> None:
            for t in targets:
                if not self.resume(t):
                    stats, seconds = measured.pop(t.name)
                    self._prune_one(t, stats, time.perf_counter() - seconds)

        how = {"sequential": sequential, "spool": self.spool, "group": self.group}
        return stream(self.model, data, self.targets, visit, leave, **how)  # type: ignore[arg-type]

    def without_data(self, sparsifier: Sparsifier) -> list[str]:
        if sparsifier.scope == "model":
            return self.together(sparsifier, None)
        for t in self.targets:
            self._load(t)
            if not self.resume(t):
                self._prune_one(t, {"salt": salt(t.name)}, time.perf_counter())
        return []

    def _prune_one(self, target: Target, stats: Stats, began: float) -> None:
        w = target.weight(self.model).detach()
        if "gram" in stats and int(stats["tokens"]) < len(stats["gram"]):
            self.notes[target.name] = (
                f"{int(stats['tokens'])} calibration tokens for {len(stats['gram'])} inputs: the Hessian is singular, "
                "damping alone speaks for what they do not show"
            )
        new, _ = self.per_layer[target.name].apply(w, stats)
        self.finish(target, new, began)

    def by_magnitude(self, names: Sequence[str]) -> list[str]:
        """Layers that no batch reached, scored by their weights: same pattern, same budget."""
        for t in (t for t in self.targets if t.name in set(names)):
            self.notes[t.name] = "no calibration batch reached it; scored by the weights' magnitude"
            self.per_layer[t.name] = replace(self.per_layer[t.name], score=magnitude, solve=None, shrink=hard)
            self._load(t)
            if not self.resume(t):
                self._prune_one(t, {}, time.perf_counter())
        return []

    def together(self, sparsifier: Sparsifier, trial: Trial | None) -> list[str]:
        """All layers at once: they compete with each other, or are scored by what they do together."""
        began = time.perf_counter()
        for t, support in first_supports(self.model, self.targets, sparsifier, self.per_layer, trial).items():
            self.finish(t, sparsifier.shrink(t.weight(self.model).detach(), support), began)
            began = time.perf_counter()
        return []

    def finish(self, target: Target, new: Tensor, began: float, resumed: bool = False) -> None:
        """The weight goes into the model; the journal is written first, so what is recorded is what was computed."""
        if self.journal is not None and not resumed:
            self.journal.write(target.name, new, of=target.weight(self.model))
        if self.offload:
            self._map(target, "pruned")
        else:
            target.write(self.model, new)
        if self.shelf is not None:
            self.shelf.renew(target, partial(self.journal.mapped, target.name))  # type: ignore[union-attr]
        seconds = time.perf_counter() - began
        kept, note = int((new != 0).sum()), self.notes.get(target.name, "")
        self.results.append(LayerResult(target.name, tuple(new.shape), kept, seconds, resumed, note))
        if self.progress is not None:
            self.progress(target.name, len(self.results), len(self.targets))

    def _load(self, target: Target) -> None:
        if self.shelf is not None:
            self.shelf.open(self.shelf.block_of(target.name))

    def finished(self, target: Target) -> bool:
        """True if an earlier run left this layer in the journal."""
        return self.journal is not None and self.journal.finished(target.name)

    def resume(self, target: Target) -> bool:
        """Take a layer from the journal; False if it is not there."""
        if not self.finished(target):
            return False
        w = self.journal.read(target.name, target.weight(self.model).detach())
        self.finish(target, w, time.perf_counter(), resumed=True)
        return True

    def _to_disk(self, target: Target) -> None:
        assert self.journal is not None  # checked by prune()
        if not self.journal.finished(target.name):
            self.journal.write(target.name, target.weight(self.model), kind="dense")
            self._map(target, "dense")

    def _map(self, target: Target, kind: str) -> None:
        """Let the parameter be a view of its file: the page cache, not the heap, holds it."""
        w = self.journal.mapped(target.name, kind=kind)  # type: ignore[union-attr]
        target.stored(self.model).data = w.t() if target.transposed else w
        if kind == "pruned":
            self.journal.forget(target.name, kind="dense")  # type: ignore[union-attr]
