"""gossamer report: the page of a run, made again from its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import Json, emit


def report(
    run: Annotated[Path, typer.Argument(help="The run.json that a demo wrote.")],
    out: Annotated[Path, typer.Option(help="The page to write; run.json is put beside it.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Print a run's table and write its page: one file, readable offline, light and dark.

    Example: gossamer report gossamer-demo/run.json --out report.html
    """
    from ..report import headline, load_run, table, write_report

    held = load_run(run)
    page = write_report(held, out)
    emit(as_json, {"report": str(page), "headline": headline(held)}, table(held), f"Report: {page}")
