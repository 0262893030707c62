"""What reaches the terminal: results on stdout, progress and errors on stderr; with --json, one object on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def out() -> Console:
    """Results. Made at each use, for tests and pipes put another stream in place. Brackets belong to patterns."""
    return Console(highlight=False, markup=False)


def err() -> Console:
    """Everything that is not a result."""
    return Console(stderr=True, highlight=False, markup=False)


def emit(as_json: bool, record: object, *drawn: RenderableType) -> None:
    """Print a result: as JSON, or drawn."""
    if as_json:
        typer.echo(json.dumps(record, indent=1, default=str))
        return
    for part in drawn:
        # Lines are for copying: folded, they would not run.
        out().print(part, soft_wrap=isinstance(part, str))


@contextmanager
def bar(title: str) -> Iterator[Report]:
    """A progress bar with the time left, on stderr; silent where stderr is not a terminal.

    Yields:
        A function (what, done, total) to call as work goes on.
    """
    console = err()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def report(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"{title}  {what[-38:]}", completed=done, total=total)

        yield report


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """A spinner for work of unknown length, on stderr; silent where stderr is not a terminal."""
    console = err()
    if not console.is_terminal:
        yield
        return
    with console.status(title):
        yield
