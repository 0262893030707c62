"""gossamer sweep: training runs over tasks, methods, densities and seeds; stopped anyhow, the same command goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ..core.errors import GossamerError, MissingDependency
from .recipe import options
from .screen import Json, emit, err
from .train import read_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..integrations.pace import Status
    from ..report.sweep import Sweep


def sweep(
    recipe: Annotated[Path, typer.Argument(help="YAML file: tasks, methods, densities, seeds, and a recipe's keys.")],
    change: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe's; repeatable.")] = None,
    out: Annotated[str, typer.Option(help="Folder of the sweep; the recipe's name with -sweep unless given.")] = "",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time: one per core unless given. 1 needs no Ray.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each run.")] = 1,
    address: Annotated[str, typer.Option(help="Ray cluster whose machines share OUT; this machine unless given.")] = "",
    as_json: Json = False,
) -> None:
    """Train every run of tasks x methods x densities x seeds, and gather one table with 95 % intervals over seeds.

    Leaves runs/ (each as gossamer train leaves it), sweep.json, table.md and sweep.svg. After Ctrl-C or a crash the
    same command keeps finished runs and goes on with half-done ones.

    Example: gossamer sweep sweep.yaml --set seeds=5 --workers 2
    """
    from ..integrations import sweep as train_all

    asked, folder = {**read_recipe(recipe), **options(change or ())}, Path(out or f"{recipe.with_suffix('')}-sweep")
    with _shown() as tell:
        found = train_all(asked, folder, workers=workers, threads=threads, address=address, tell=tell)
    record = {"out": str(folder), "figure": _figure(found, folder), **found.to_dict()}
    emit(
        as_json,
        record,
        *(() if as_json else (_table(found), _note(found), f"Kept in {folder}: table.md, sweep.json, sweep.svg")),
    )
    if found.failures:
        told = "\n".join(f"{name}: {why}" for name, why in found.failures.items())
        raise GossamerError(f"{len(found.failures)} runs failed; the same command tries them again\n{told}")


@contextmanager
def _shown() -> Iterator[Callable[[Status], None]]:
    """A line for every run that ends, and on a terminal one that tells what is left; on stderr."""
    console = err()
    with console.status("sweep") as line:

        def tell(status: Status) -> None:
            count = f"{status.done} of {status.total} runs"
            left = "" if status.left is None else f", about {_words(status.left)} left"
            if status.over[0]:
                console.print(f"{status.over[0]}: {status.over[1]}  [{count}{left}]", soft_wrap=True)
            line.update(f"sweep: {count}{left}  {' '.join(status.at_work)[-60:]}")

        yield tell


def _words(seconds: float) -> str:
    """ "40 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _figure(found: Sweep, folder: Path) -> str:
    """The picture, or why there is none: a sweep must not be lost for want of a plotting library."""
    from ..report.sweep_figure import write_sweep_figure

    try:
        return str(write_sweep_figure(found, folder / "sweep.svg"))
    except MissingDependency as error:
        return f"none: {error}"


def _note(found: Sweep) -> str:
    seeds = sorted({len(r.values) for r in found.rows})
    return f"± 95 % interval over {' or '.join(map(str, seeds))} seeds; FLOPs of the dense network's, zeros skipped.\n"


def _table(found: Sweep) -> Table:
    drawn = Table("task", "method", "kept", "figure", "FLOPs", "CPU s", box=box.SIMPLE_HEAD)
    for row in found.rows:
        figure = f"{row.quality_label} {row.quality.text('.4f')}"
        drawn.add_row(
            row.task, row.method, f"{row.kept:.3f}", figure, f"{row.share:.1%}", f"{row.processor_seconds:.1f}"
        )
    return drawn
