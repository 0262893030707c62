"""How far a sweep is, and how long the rest may take: from the runs' own learning curves and records."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..recipes.grid import Job
from ..recipes.train import CURVE
from ..recipes.trained import RUN, TrainedRun, read_trained

EVERY = 1.0  # seconds between two looks


@dataclass(frozen=True)
class Status:
    """Where a sweep is.

    Args:
        done, failed, total: runs.
        at_work: names of the runs that are being trained.
        left: until all are done, as far as finished steps tell; None before there are any. Unit: s.
        over: the run that has just ended, and what came of it in words; ("", "") between ends.
    """

    done: int
    failed: int
    total: int
    at_work: tuple[str, ...]
    left: float | None
    over: tuple[str, str] = ("", "")


class Pace:
    """Watches the runs' folders; workers need not report."""

    def __init__(self, jobs: Sequence[Job], folder: Path, workers: int, tell: Callable[[Status], None] | None) -> None:
        self.jobs, self.folder, self.workers, self.tell = {j.name: j for j in jobs}, folder, workers, tell
        self.steps: dict[str, int] = {}
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)  # per step, by task
        self.begun: dict[str, tuple[float, int]] = {}
        self.done, self.failed = set[str](), set[str]()
        self.looked = 0.0

    def finished(self, job: Job) -> bool:
        """True for a run that an earlier call finished; it then counts as done."""
        if not (self.folder / job.name / RUN).exists():
            return False
        self._count(job, read_trained(self.folder / job.name))
        return True

    def at(self, name: str, step: int) -> None:
        """A run in this process has come to this step."""
        if step < self.jobs[name].plan.steps:
            self._reached(name, step)
        self._maybe_tell()

    def look(self) -> None:
        """See how far the runs of other processes are."""
        for name in self.jobs.keys() - self.done - self.failed:
            if step := _last_step(self.folder / name / CURVE):
                self._reached(name, step)
        self._maybe_tell()

    def over(self, name: str, error: str) -> None:
        """A run has ended."""
        self.begun.pop(name, None)
        if error:
            self.failed.add(name)
            self._say((name, f"failed: {error}"))
            return
        run = read_trained(self.folder / name)
        self._count(self.jobs[name], run)
        self._say((name, f"{run.quality_label} {run.score:.4f} in {run.seconds:.1f} s"))

    def left(self) -> float | None:
        """Seconds until all is done, if steps go on as they went: per task where it is known."""
        known = {task: sum(times) / len(times) for task, times in self._paces().items()}
        if not known:
            return None
        usual = sum(known.values()) / len(known)
        rest = [j for n, j in self.jobs.items() if n not in self.done and n not in self.failed]
        work = sum((j.plan.steps - self.steps.get(j.name, 0)) * known.get(j.plan.task, usual) for j in rest)
        return work / min(self.workers, max(len(rest), 1))

    def _paces(self) -> dict[str, list[float]]:
        paces = {task: list(times) for task, times in self.seconds.items()}
        for name, (since, first) in self.begun.items():
            if (steps := self.steps[name] - first) > 0:
                paces.setdefault(self.jobs[name].plan.task, []).append((time.monotonic() - since) / steps)
        return paces

    def _count(self, job: Job, run: TrainedRun) -> None:
        self.done.add(job.name)
        self.seconds[job.plan.task].append(run.seconds / job.plan.steps)

    def _reached(self, name: str, step: int) -> None:
        self.steps[name] = step
        self.begun.setdefault(name, (time.monotonic(), step))

    def _maybe_tell(self) -> None:
        if time.monotonic() - self.looked >= EVERY:
            self._say()

    def _say(self, over: tuple[str, str] = ("", "")) -> None:
        self.looked = time.monotonic()
        if self.tell is not None:
            counts = (len(self.done), len(self.failed), len(self.jobs))
            moving = (n for n, (_, first) in self.begun.items() if self.steps[n] > first)
            self.tell(Status(*counts, tuple(sorted(moving)), self.left(), over))


def _last_step(curve: Path) -> int:
    """Of a learning curve that another process may be writing; 0 where there is none."""
    try:
        lines = curve.read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0
