"""What a sweep found: one row per task, method and density, with means and 95 % intervals over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from ..core.files import whole_file
from ..recipes.trained import TrainedRun
from .machine import hardware, versions

SCHEMA = "gossamer-sweep-1"
# 97.5 % points of Student's t with 1, 2, ... degrees of freedom; beyond the last it is used on, which is too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
HEADS = ("task", "method", "kept", "seeds", "figure", "not zero", "FLOPs", "of dense", "seconds", "CPU s")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and half the width of its 95 % interval; None with one seed."""

    mean: float
    half: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """mean ± t·s/√n, taking the values as independent and normal."""
        n = len(values)
        half = T[min(n - 2, len(T) - 1)] * stdev(values) / n**0.5 if n > 1 else None
        return cls(mean(values), half)

    def text(self, form: str) -> str:
        """ "0.8731 ± 0.0042", with the numbers in `form`."""
        return f"{self.mean:{form}}" + (f" ± {self.half:{form}}" if self.half is not None else "")


@dataclass(frozen=True)
class Row:
    """One method at one density on one task. Means over seeds, where nothing else is said.

    Args:
        title: of the task.
        density: asked for; None = fixed by the method, or dense.
        kept: share of the linear and convolution layers' weights.
        quality_label, higher_is_better: of the figure that counts.
        values: that figure by seed.
        nonzeros: of all parameters.
        flops: training FLOPs with zeros skipped, first parts included.
        share: of the same steps of the dense network.
        seconds: in training steps, first parts included. Unit: s.
        processor_seconds: of the processor, over all threads, in the same steps. Unit: s.
    """

    task: str
    title: str
    method: str
    density: float | None
    kept: float
    quality_label: str
    higher_is_better: bool
    values: Mapping[int, float]
    nonzeros: float
    flops: float
    share: float
    seconds: float
    processor_seconds: float

    @property
    def quality(self) -> Interval:
        """Of the figure that counts."""
        return Interval.of(list(self.values.values()))

    def cells(self) -> tuple[str, ...]:
        """Text per column of `HEADS`."""
        numbers = (f"{self.nonzeros:,.0f}", f"{self.flops:.3g}", f"{self.share:.3f}")
        times = (f"{self.seconds:.1f}", f"{self.processor_seconds:.1f}")
        figure = f"{self.quality_label} {self.quality.text('.4f')}"
        return (self.task, self.method, f"{self.kept:.3f}", str(len(self.values)), figure, *numbers, *times)


@dataclass(frozen=True)
class Sweep:
    """What is there of a sweep.

    Args:
        rows: by task, then in the order asked for.
        failures: what stopped a run, by its name.
        missing: runs that are not finished.
        machine, libraries: what it was measured on.
    """

    rows: tuple[Row, ...]
    failures: Mapping[str, str]
    missing: tuple[str, ...]
    machine: Mapping[str, str]
    libraries: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        rows = [{**asdict(r), "mean": r.quality.mean, "half": r.quality.half} for r in self.rows]
        return {"schema": SCHEMA, **{**asdict(self), "rows": rows}}

    def table(self) -> str:
        """Markdown: the rows, and below them what failed or is missing."""
        lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
        lines += ["| " + " | ".join(r.cells()) + " |" for r in self.rows]
        lines += [f"\n{name} failed: {why}" for name, why in self.failures.items()]
        lines += [f"\n{len(self.missing)} runs are not finished."] if self.missing else []
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Trial:
    """One finished run as a sweep counts it: what it cost together with its first part."""

    label: str
    density: float | None
    run: TrainedRun
    first: TrainedRun | None = None

    def cost(self, what: Callable[[TrainedRun], float]) -> float:
        """The sum of something over both parts."""
        return what(self.run) + (what(self.first) if self.first else 0)


def collected(trials: Iterable[Trial], failures: Mapping[str, str], missing: Sequence[str]) -> Sweep:
    """Group finished runs by task, method and density."""
    groups: dict[tuple, list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.run.plan["task"], trial.label, trial.density), []).append(trial)
    order = list(dict.fromkeys(task for task, _, _ in groups))
    rows = [_row(members) for _, members in sorted(groups.items(), key=lambda item: order.index(item[0][0]))]
    return Sweep(tuple(rows), dict(failures), tuple(missing), hardware(), versions(("torch", "ray")))


def _row(trials: Sequence[Trial]) -> Row:
    run = trials[0].run
    average = lambda what: mean(t.cost(what) for t in trials)
    flops = average(lambda r: r.flops)
    return Row(
        task=str(run.plan["task"]),
        title=run.title,
        method=trials[0].label,
        density=trials[0].density,
        kept=mean(t.run.density for t in trials),
        quality_label=run.quality_label,
        higher_is_better=run.higher_is_better,
        values={int(t.run.plan["seed"]): t.run.score for t in trials},  # type: ignore[call-overload]
        nonzeros=mean(t.run.nonzeros for t in trials),
        flops=flops,
        share=flops / max(average(lambda r: r.dense_flops), 1),
        seconds=average(lambda r: r.seconds),
        processor_seconds=average(lambda r: r.processor_seconds),
    )


def write_sweep(found: Sweep, folder: str | Path) -> Path:
    """FOLDER/sweep.json and table.md, each whole or not at all; returns the first."""
    folder = Path(folder)
    with whole_file(folder / "table.md") as draft:
        draft.write_text(found.table(), encoding="utf-8")
    with whole_file(folder / "sweep.json") as draft:
        draft.write_text(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    return folder / "sweep.json"
