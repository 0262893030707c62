"""gossamer demo: a real model in, a smaller and faster one out, measured here and now."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from .screen import Json, bar, emit


class Which(StrEnum):
    """The two demos."""

    minilm = "minilm"
    llm = "llm"


FOLDERS = {Which.minilm: "gossamer-demo", Which.llm: "gossamer-demo-llm"}


def demo(
    which: Annotated[Which, typer.Argument(help="minilm: a sentence encoder; llm: SmolLM2-135M.")] = Which.minilm,
    out: Annotated[Path | None, typer.Option(help="Folder to write; gossamer-demo or gossamer-demo-llm.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="About how long it may take, once the assets are here.")] = 300,
    as_json: Json = False,
) -> None:
    """Prune, pack and measure a real pretrained model beside the best dense engines, and write a report.

    Fetches about 97 MB on first use (llm: 178 MB), with no account and no model hub.

    Example: gossamer demo
    """
    from ..report import headline, table, write_report

    folder = out or Path(FOLDERS[which])
    with bar("demo") as progress:
        run = import_module(f"gossamer.demos.{which}").run(folder, seconds=seconds, progress=progress)
    page = write_report(run, folder / "report.html")
    record = {"report": str(page), "headline": headline(run), "run": run.to_dict()}
    lines = ["Load it and run it:", *(f"  {line}" for line in run.load_lines)] if run.load_lines else []
    emit(as_json, record, table(run), f"Report: {page.resolve()}", *lines)
