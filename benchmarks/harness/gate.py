"""The numerics gate: a solver's output against a float64 truth. Who fails it gets no speed-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .contract import Case
from .problem import Problem
from .worker import save


def relative_error(output: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """max |output - truth| / max |truth| over all arrays; infinite where shapes or their number differ, NaN for NaN."""
    if len(output) != len(truth) or any(a.shape != b.shape for a, b in zip(output, truth)):
        return math.inf
    return max((_one(a, b) for a, b in zip(output, truth)), default=math.inf)


def _one(output: np.ndarray, truth: np.ndarray) -> float:
    if not np.isfinite(output).all():
        return math.inf
    largest = float(np.abs(truth).max(initial=0.0)) or 1.0
    return float(np.abs(output - truth).max(initial=0.0)) / largest


class ExportFailed(RuntimeError):
    """A case has no files for the solvers that read files; says why."""


@dataclass(frozen=True)
class Truths:
    """Exact outputs and exported files, made once per case in `folder` by the main environment.

    The parent alone compares: a solver's process only says what it computed.
    """

    problem: Problem
    folder: Path

    def files(self, case: Case, *, exported: bool) -> Path:
        """The folder of a case; with `exported` it also holds what foreign environments read."""
        place = self.folder / case.id
        place.mkdir(parents=True, exist_ok=True)
        wanted = [n for n, want in (("truth.npz", True), ("exported", exported)) if want]
        if not all((place / n).exists() for n in wanted):
            self._make(case, place, exported=exported)
        return place

    def _make(self, case: Case, place: Path, *, exported: bool) -> None:
        module = self.problem.module
        data = module.build(case)
        save(module.exact(case, data), str(place / "truth.npz"))
        if exported:
            try:
                module.export(case, data, place)
            except Exception as error:  # exporters run a compiler over foreign code and may fail in any way
                first = (str(error).splitlines() or [""])[0]
                raise ExportFailed(f"{case.id} cannot be exported: {type(error).__name__}: {first}") from error
            (place / "exported").touch()

    def error(self, case: Case, output: Path) -> float:
        """How far an output file is from the truth, by the problem's own measure if it has one."""
        measure = getattr(self.problem.module, "error", relative_error)
        return float(measure(arrays(output), arrays(self.folder / case.id / "truth.npz")))


def arrays(file: Path) -> list[np.ndarray]:
    """The arrays of a file in their order."""
    with np.load(file) as held:
        return [held[f"arr_{i}"] for i in range(len(held.files))]
