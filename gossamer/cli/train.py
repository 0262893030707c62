"""gossamer train: one run of a built-in task, dense or sparse; stopped anyhow, the same command goes on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..core.errors import GossamerError, MissingDependency, unknown
from .screen import Json, bar, emit

if TYPE_CHECKING:
    from ..data.tasks import Task
    from ..recipes.plan import Plan
    from ..recipes.trained import TrainedRun

LISTS = ("targets", "skip")
FRACTIONS = ("density", "sparsity")


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: task, method, density, steps, rate, seed, ...")],
    change: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe's; repeatable.")] = None,
    out: Annotated[str, typer.Option(help="Folder of the run; the recipe's name with -run unless given.")] = "",
    as_json: Json = False,
) -> None:
    """Train a network of a built-in task (teacher, clothes-cnn, ucr-cnn, wikitext-lstm, ...), dense or sparse.

    Leaves model.safetensors, run.json, metrics.jsonl (grows while training) and report.html. Ctrl-C saves the step;
    after that, or after a crash, the same command goes on and ends as if nothing had happened.

    Example: gossamer train rigl.yaml --set seed=1 --out runs/rigl-1
    """
    from ..data.tasks import task as task_called
    from ..recipes.train import train as train_task

    held = {**_read(recipe), **_changes(change or ())}
    task = task_called(str(held.get("task", "")))
    plan, folder = _plan(held, task), Path(out or f"{recipe.with_suffix('')}-run")
    with bar(f"training {plan.method}") as progress:
        run = train_task(task, plan, folder, progress=progress)
    page = _page(run, folder)
    record = {"out": str(folder), "report": page, "score": run.score, **run.to_dict()}
    emit(as_json, record, *(() if as_json else _summary(run, folder, page)))


def _read(recipe: Path) -> dict[str, object]:
    import yaml

    try:
        held = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise GossamerError(f"{recipe} cannot be read as a recipe: {error}") from error
    if not isinstance(held, dict):
        raise GossamerError(f"{recipe} must be a YAML mapping such as 'task: teacher', got {type(held).__name__}")
    return {str(k): v for k, v in held.items() if v is not None}


def _changes(pairs: tuple[str, ...] | list[str]) -> dict[str, object]:
    from .recipe import options

    return options(pairs)


def _plan(held: dict[str, object], task: Task) -> Plan:
    """A recipe's keys as a plan, checked; steps, batch and rate are the task's unless given."""
    from ..recipes.plan import Plan

    known = {f.name: f for f in fields(Plan)}
    for key in held:
        if key not in known and key != "sparsity":
            raise unknown("recipe key", key, [*known, "sparsity"])
    usual = {"steps": task.steps, "batch": task.size, "rate": task.rate}
    given = {**usual, **{k: _checked(k, v, known) for k, v in held.items()}}
    if "sparsity" in given:
        if "density" in given:
            raise GossamerError("density and sparsity say the same thing; give one of the two")
        given["density"] = 1.0 - given.pop("sparsity")  # type: ignore[operator]
    return Plan(**given)  # type: ignore[arg-type]


def _checked(key: str, value: object, known: dict) -> object:
    """Of the kind that the plan's default, or the field's own type, has."""
    if key in LISTS:
        return tuple(_of(key, v, str, "text") for v in ([value] if isinstance(value, str) else value))  # type: ignore
    if key in FRACTIONS or key in ("rate", "decay"):
        # YAML 1.1 reads 1e-3, without a point, as text.
        number = _float(value) if isinstance(value, str) else value
        return float(_of(key, number, (int, float), "a number"))  # type: ignore[arg-type]
    if key == "allocation":
        return _of(key, value, (str, dict), "a rule's name, or a density per layer")
    if key == "options":
        return _of(key, value, dict, "a mapping")
    kind = int if known[key].type == "int" else str
    return _of(key, value, kind, "a whole number" if kind is int else "text")


def _float(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _of(key: str, value: object, kind: type | tuple[type, ...], wanted: str) -> object:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GossamerError(f"recipe key {key!r} needs {wanted}, got {value!r}")
    return value


def _page(run: TrainedRun, folder: Path) -> str:
    """The report, or why there is none: a run must not be lost for want of a plotting library."""
    from ..report.training import write_training_report

    try:
        return str(write_training_report(run, folder / "report.html"))
    except MissingDependency as error:
        return f"none: {error}"


def _summary(run: TrainedRun, folder: Path, page: str) -> tuple[Table | str, ...]:
    from ..report.training import facts, headline

    drawn = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts(run):
        drawn.add_row(name, value)
    return (headline(run), drawn, f"\nReport: {page}", f"Compare it:  gossamer doctor compare {folder} OTHER-RUN")
