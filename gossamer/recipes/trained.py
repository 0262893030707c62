"""What a training run leaves behind: a frozen record, written as run.json and read back unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..core.errors import FileDamaged
from ..core.files import whole_file

SCHEMA = "gossamer-training-1"
RUN, WEIGHTS = "run.json", "model.safetensors"


@dataclass(frozen=True)
class TrainedLayer:
    """A linear or convolution layer, or a weight of a recurrent one, at the end: links kept of its size, dead ends."""

    name: str
    kept: int
    size: int
    outputs: int
    dead_outputs: int = 0
    dead_inputs: int = 0


@dataclass(frozen=True)
class TrainedRun:
    """One finished training run.

    Args:
        plan: what was asked for, see `Plan`.
        title: of the task.
        quality: figures on data that was not trained on.
        quality_label: the one that counts.
        higher_is_better: False for errors and perplexity.
        nonzeros, parameters: of all weights and biases together.
        layers: the linear, convolution and recurrent layers, one entry per weight.
        flops: training FLOPs of these layers with every zero skipped.
        dense_flops: the same steps of the dense layers.
        start_flops: spent on the network that this run started from, and those before it; 0 for a new one.
        seconds: time in training steps.
        interruptions: how often it was stopped and went on.
        churned: links that came or went.
        curve: (step, loss of that step's batch, density).
        torch_version, threads: of the process that finished it.
        processor_seconds: processor time of the training steps, over all threads, without what others took. Unit: s.
    """

    plan: dict[str, object]
    title: str
    quality: dict[str, float]
    quality_label: str
    higher_is_better: bool
    nonzeros: int
    parameters: int
    layers: tuple[TrainedLayer, ...]
    flops: int
    dense_flops: int
    start_flops: int
    seconds: float
    interruptions: int
    churned: int
    curve: tuple[tuple[int, float, float], ...]
    torch_version: str = ""
    threads: int = 0
    processor_seconds: float = 0.0

    @property
    def score(self) -> float:
        """The figure that counts."""
        return self.quality[self.quality_label]

    @property
    def is_dense(self) -> bool:
        """True if nothing was taken away."""
        return self.plan["method"] == "dense"

    @property
    def name(self) -> str:
        """Method, density and seed in few words."""
        density = f", density {self.density:.3g}" if not self.is_dense else ""
        return f"{self.plan['method']}{density}, seed {self.plan['seed']}"

    @property
    def density(self) -> float:
        """Share of the layers' weights that is kept."""
        return sum(r.kept for r in self.layers) / max(sum(r.size for r in self.layers), 1)

    @property
    def cost(self) -> int:
        """FLOPs of this run and of those it started from."""
        return self.flops + self.start_flops

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"schema": SCHEMA, **asdict(self)}


def write_trained(run: TrainedRun, path: str | Path) -> Path:
    """Save as JSON, all or nothing."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(run.to_dict(), indent=1, allow_nan=False) + "\n")
    return Path(path)


def read_trained(path: str | Path) -> TrainedRun:
    """Read what `gossamer train` wrote.

    Args:
        path: of run.json, or of the folder that holds it.

    Raises:
        FileDamaged: it is not the record of a training run.
    """
    file = Path(path) / RUN if Path(path).is_dir() else Path(path)
    try:
        held = json.loads(file.read_text())
        return _read(held)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileDamaged(
            f"{file} is no record of a training run ({error}); pass a folder that 'gossamer train' finished"
        ) from error


def _read(held: Mapping[str, object]) -> TrainedRun:
    if held["schema"] != SCHEMA:
        raise ValueError(f"schema {held['schema']!r}, this version reads {SCHEMA!r}")
    parts = {f.name: held[f.name] for f in fields(TrainedRun)}
    parts["layers"] = tuple(TrainedLayer(**row) for row in held["layers"])  # type: ignore[attr-defined]
    parts["curve"] = tuple((int(s), float(x), float(d)) for s, x, d in held["curve"])  # type: ignore[attr-defined]
    return TrainedRun(**parts)  # type: ignore[arg-type]
