"""What a measured run is made of: frozen records that are written as run.json and read back unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from ..core.errors import FileDamaged, FormatError, near, unknown
from ..core.files import whole_file

R = TypeVar("R")
SCHEMA = 1


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Setting:
    """One way of making the model sparse, and what it costs in quality.

    Args:
        name: what the reader sees, such as "4-row, 80 % zeros". The dense model is a setting too, with density 1.
        quality: every quality figure by its label.
        quality_label: which of them the headline and the plots use.
        agreement: fraction of answers equal to the dense model's, in [0, 1]; None = not measured.
        bytes_disk: of the saved model. Unit: bytes.
        bytes_memory: of its weights when loaded. Unit: bytes.
        density: fraction of the targeted weights kept, in [0, 1].
        seconds_to_make: time to prune (and recover). Unit: seconds.
        higher_is_better: False for perplexity and errors.
        quality_unit: "%" = the figures are fractions, shown in per cent and compared in points; "" = plain numbers,
            compared by ratio.
    """

    name: str
    quality: dict[str, float]
    quality_label: str
    agreement: float | None
    bytes_disk: int
    bytes_memory: int
    density: float
    seconds_to_make: float
    higher_is_better: bool = True
    quality_unit: str = "%"

    def __post_init__(self) -> None:
        if self.quality_label not in self.quality:
            raise FormatError(
                f"setting {self.name!r} has no quality figure {self.quality_label!r}; "
                + near(self.quality_label, self.quality)
            )

    @property
    def score(self) -> float:
        """The figure that the headline uses."""
        return self.quality[self.quality_label]

    @property
    def is_dense(self) -> bool:
        """True for the model that nothing was taken from."""
        return self.density >= 1.0


@dataclass(frozen=True)
class EngineRow:
    """How fast one engine ran one setting.

    Args:
        setting: name of a `Setting`.
        engine: "gossamer", "torch", "onnxruntime", "openvino" ...
        threads: it was allowed to use.
        latency_ms: median of one call. Unit: ms.
        latency_iqr: distance between the quartiles of the same calls. Unit: ms.
        throughput: in `unit`; only rows of the same unit and threads are compared.
        unit: such as "sentences/s" or "tokens/s".
        version: of the engine.
        note: anything a reader must know to read the figure.
        precision: of weights and activations while it runs. Speed-ups are against the fastest "fp32" dense engine; an
            engine that rounds further is compared by name.
    """

    setting: str
    engine: str
    threads: int
    latency_ms: float
    latency_iqr: float
    throughput: float
    unit: str
    version: str = ""
    note: str = ""
    precision: str = "fp32"


@dataclass(frozen=True)
class LayerRow:
    """What was chosen for one layer of one setting, and why.

    Args:
        shape: of the weight, outputs first.
        density: fraction kept, in [0, 1].
        format: "dense", "csr", "rowgrouped" ...
        backend: the kernel that runs it.
        dense_ms: torch's dense product on this layer's shape; None = not measured. Unit: ms.
        best_dense_ms: the fastest dense product known for it. Unit: ms.
        chosen_ms: what runs now. Unit: ms.
        reason: why this was chosen, or why the layer was left dense.
    """

    setting: str
    name: str
    shape: tuple[int, ...]
    density: float
    format: str
    backend: str
    dense_ms: float | None
    best_dense_ms: float | None
    chosen_ms: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def packed(self) -> bool:
        """True if something other than the dense weight is stored."""
        return self.format != "dense"


@dataclass(frozen=True)
class Sample:
    """What each setting answers to the same prompt, for the reader's own eyes.

    Args:
        texts: by setting; what comes after the prompt.
    """

    prompt: str
    texts: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One measured run: everything that report.html says is computed from this.

    Args:
        title: the model and the task.
        hardware: such as {"cpu": ..., "cores": ..., "memory": ...}.
        versions: of the libraries.
        settings: the dense model first.
        engines: one row per setting, engine and thread count.
        layers: one row per setting and layer.
        notes: sentences a reader must know.
        command: what was typed.
        saved_at: when it was measured, ISO 8601.
        load_lines: the lines that load the saved model and run it.
        samples: continuations of the same prompts side by side.

    Raises:
        FormatError: a row speaks of a setting that is not there, or no setting is dense.
    """

    title: str
    hardware: dict[str, str]
    versions: dict[str, str]
    settings: tuple[Setting, ...]
    engines: tuple[EngineRow, ...]
    layers: tuple[LayerRow, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
    saved_at: str = ""
    load_lines: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        for name in ("settings", "engines", "layers", "notes", "load_lines", "samples"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "saved_at", self.saved_at or _now())
        names = [s.name for s in self.settings]
        if len(set(names)) != len(names):
            raise FormatError(f"two settings share a name: {names}; give each its own")
        if not any(s.is_dense for s in self.settings):
            raise FormatError(f"no setting is dense, so there is nothing to compare with; got {names}")
        for row in (*self.engines, *self.layers):
            if row.setting not in names:
                raise unknown("setting", row.setting, names)
        for name in (name for sample in self.samples for name in sample.texts):
            if name not in names:
                raise unknown("setting", name, names)

    def setting(self, name: str) -> Setting:
        """The setting called `name`."""
        return next(s for s in self.settings if s.name == name)

    @property
    def dense(self) -> Setting:
        """What everything is compared with."""
        return next(s for s in self.settings if s.is_dense)

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {"schema": SCHEMA, **asdict(self)}


def write_run(run: Run, path: str | Path) -> Path:
    """Save a run as JSON, all or nothing."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(run.to_dict(), indent=1, allow_nan=False) + "\n")
    return Path(path)


def load_run(path: str | Path) -> Run:
    """Read a run back from the file that `write_run` wrote.

    Raises:
        FileDamaged: it is not JSON, or not a run.
        FormatError: a field is missing, unknown, or disagrees with another.
    """
    try:
        held = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise FileDamaged(f"{path} cannot be read as a run ({error}); pass the run.json that a demo wrote") from error
    if not isinstance(held, dict) or held.pop("schema", None) != SCHEMA:
        raise FileDamaged(f"{path} is JSON, but not a run of schema {SCHEMA}; pass the run.json that a demo wrote")
    parts = {"settings": Setting, "engines": EngineRow, "layers": LayerRow, "samples": Sample}
    for name, record in parts.items():
        held[name] = [_read(record, row) for row in held.get(name, [])]
    return _read(Run, held)


def _read(record: type[R], values: Mapping[str, object]) -> R:
    known = {f.name: f for f in fields(record)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise unknown(f"field of {record.__name__}", name, known)
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [n for n in required if n not in values]
    if missing:
        raise FormatError(f"{record.__name__} lacks {', '.join(missing)}; the file was written by another version")
    return record(**values)
