"""gossamer train: one run of a built-in task, dense or sparse; stopped anyhow, the same command goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..core.errors import GossamerError, MissingDependency
from .screen import Json, bar, emit

if TYPE_CHECKING:
    from ..recipes.trained import TrainedRun


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
    from ..recipes.plan_keys import plan_from
    from ..recipes.train import train as train_task

    held = {**read_recipe(recipe), **_changes(change or ())}
    task = task_called(str(held.get("task", "")))
    plan = plan_from(held, steps=task.steps, batch=task.size, rate=task.rate)
    folder = Path(out or f"{recipe.with_suffix('')}-run")
    with bar(f"training {plan.method}") as progress:
        run = train_task(task, plan, folder, progress=progress)
    page = _page(run, folder)
    record = {"out": str(folder), "report": page, "score": run.score, **run.to_dict()}
    emit(as_json, record, *(() if as_json else _summary(run, folder, page)))


def read_recipe(recipe: Path) -> dict[str, object]:
    """A YAML mapping, without its empty keys.

    Raises:
        GossamerError: the file cannot be read, or is no mapping.
    """
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
