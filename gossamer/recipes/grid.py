"""The runs of a sweep: tasks × methods × densities × seeds, each a plan of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..core.errors import GossamerError
from ..core.registry import get_method
from .plan import Plan
from .plan_keys import plan_from

AXES = ("tasks", "methods", "densities", "seeds")
ENTRY = ("name", "densities", "first", "tasks")
# A dense first part of a run knows nothing of the method that follows.
OF_METHODS = ("method", "density", "sparsity", "allocation", "backend", "targets", "skip", "options")
RUNS = "runs"


class Usual(Protocol):
    """What a task says of its usual run; `gossamer.data.tasks.Task` does."""

    @property
    def steps(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def rate(self) -> float: ...


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        name: of its folder under runs/.
        label: the method as the table calls it; "" for the first part of other runs, which the table leaves out.
        density: asked for; None = the method fixes it, or the run is dense.
        after: name of the run whose weights it starts from; "" = none.
    """

    name: str
    label: str
    density: float | None
    plan: Plan
    after: str = ""


def grid(asked: Mapping[str, object], out: str | Path, task: Callable[[str], Usual]) -> tuple[Job, ...]:
    """All runs of a sweep, seed by seed, so that one stopped early has seen every method; first parts come first.

    Args:
        asked: `tasks`, `methods`, `densities` and `seeds` (a count or a list); every other key is a recipe's and holds
            for all runs. A task is a name or a mapping `{task: ..., key: ...}`, with `densities` of its own if given. A
            method is a name or a mapping `{method: ..., key: ...}` that may also give a `name` for the table, its own
            `densities` (an empty list where the method fixes its density), `first` (share of the steps that a dense run
            takes before; the method gets the rest) and `tasks`: `{task: {key: ...}}`, or `{task: null}` without.
        out: folder of the sweep; runs that start from others name it.
        task: finds one by name.

    Raises:
        UnknownName: no such task, method or key.
        GossamerError: an axis is missing or empty, or two runs would share a folder.
    """
    for axis in ("tasks", "methods"):
        _listed(asked, axis)
    common = {k: v for k, v in asked.items() if k not in AXES}
    folder = Path(out).absolute() / RUNS
    found: dict[str, Job] = {}
    for seed in _seeds(asked.get("seeds", 1)):
        for place in _listed(asked, "tasks"):
            own = {**common, **_entry(place, "task"), "seed": seed}
            usual, densities = task(str(own["task"])), own.pop("densities", asked.get("densities", ()))
            for method in _listed(asked, "methods"):
                for job in _of_method(own, _entry(method, "method"), densities, usual, folder):
                    _add(found, job)
    return tuple(found.values())


def _listed(asked: Mapping[str, object], axis: str) -> Sequence[object]:
    held = asked.get(axis)
    if not isinstance(held, (list, tuple)) or not held:
        raise GossamerError(f"a sweep needs {axis}: a list with one entry or more, got {held!r}")
    return held


def _seeds(asked: object) -> Sequence[int]:
    seeds = range(asked) if type(asked) is int else asked
    if not isinstance(seeds, (range, list, tuple)) or not seeds or any(type(s) is not int for s in seeds):
        raise GossamerError(f"seeds is a count from 1 or a list of whole numbers, got {asked!r}")
    return seeds


def _entry(given: object, key: str) -> dict[str, object]:
    held = {key: given} if isinstance(given, str) else given
    if not isinstance(held, Mapping) or key not in held:
        raise GossamerError(f"an entry of {key}s is a name or a mapping with {key}:, got {given!r}")
    return {str(k): v for k, v in held.items()}  # YAML reads a bare "on" as a truth value


def _of_method(
    common: Mapping[str, object], entry: dict[str, object], densities: object, task: Usual, folder: Path
) -> list[Job]:
    """The runs of one method on one task with one seed."""
    label, own_densities, first, places = (entry.pop(k, None) for k in ENTRY)
    changes = _changes(places, str(common["task"]))
    if changes is None:
        return []
    held = {**common, **entry, **changes}
    method = str(held["method"])
    dense = method == "dense"
    if not dense:
        get_method(method)
    chosen = [None] if dense else _densities(densities if own_densities is None else own_densities)
    jobs: list[Job] = []
    for density in chosen:
        asked = held if density is None else {**held, "density": density}
        plan = plan_from(asked, steps=task.steps, batch=task.size, rate=task.rate)
        jobs += _stages(plan, asked, task, str(label or method), first, folder)
    return jobs


def _changes(places: object, task: str) -> Mapping[str, object] | None:
    """What a method does differently on this task; None = it leaves the task out."""
    if places is None:
        return {}
    if not isinstance(places, Mapping):
        raise GossamerError(f"tasks: of a method is a mapping of tasks to changes, or to null, got {places!r}")
    changes = places.get(task, {})
    if changes is not None and not isinstance(changes, Mapping):
        raise GossamerError(f"tasks: {{{task}: ...}} of a method is a mapping of recipe keys, or null, got {changes!r}")
    return changes


def _densities(asked: object) -> Sequence[float | None]:
    if not isinstance(asked, (list, tuple)) or any(type(d) not in (int, float) or not 0 < d <= 1 for d in asked):
        raise GossamerError(f"densities is a list of fractions kept, above 0 and up to 1, got {asked!r}")
    return [float(d) for d in asked] or [None]


def _stages(plan: Plan, held: Mapping[str, object], task: Usual, label: str, first: object, folder: Path) -> list[Job]:
    """The run, and the dense one before it if it has a first part; both together take the plan's steps."""
    density = f"-{plan.density:g}" if plan.density is not None else ""
    name = f"{plan.task}/{_slug(label)}{density}-seed{plan.seed}"
    if first is None:
        return [Job(name, label, plan.density, plan)]
    if type(first) is not float or not 0 < first < 1:
        raise GossamerError(f"first is the share of the steps before the method, between 0 and 1, got {first!r}")
    steps = min(max(round(first * plan.steps), 1), plan.steps - 1)
    usual = {"steps": task.steps, "batch": task.size, "rate": task.rate}
    dense = plan_from({**{k: v for k, v in held.items() if k not in OF_METHODS}, "steps": steps}, **usual)  # type: ignore[arg-type]
    before = f"{plan.task}/first-{steps}-seed{plan.seed}"
    rest = {**held, "steps": plan.steps - steps, "start": str(folder / before)}
    return [
        Job(before, "", None, dense),
        Job(name, label, plan.density, plan_from(rest, **usual), before),  # type: ignore[arg-type]
    ]


def _slug(label: str) -> str:
    return "-".join(re.findall(r"[a-z0-9.]+", label.lower()))


def _add(found: dict[str, Job], job: Job) -> None:
    """Runs share a first part; nothing else may have a name twice."""
    held = found.setdefault(job.name, job)
    if held != job:
        remedy = "give one of the methods a name: of its own"
        if not job.label:  # no name: of a method is in its folder's
            remedy = "methods whose first: parts are as long share one, so give both the same keys, or another first:"
        raise GossamerError(f"two different runs would be kept in {job.name}; {remedy}")
    if held is not job and job.label:
        raise GossamerError(f"{job.name} is asked for twice; leave one of the two out")
