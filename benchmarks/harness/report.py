"""A problem's result: printed, and written as JSON, Markdown and SVG beside the machine's name."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from benchmarks.results import FOLDER, write_results

from .compare import Comparison
from .environments import EnvironmentFailed, installed
from .plots import draw
from .tables import aligned, heads, notes, rows


def show(compared: Comparison) -> None:
    """The table and its notes, on the terminal."""
    print(compared.problem.title, aligned(heads(compared), rows(compared)), sep="\n\n")
    print("", *(f"- {note}" for note in notes(compared)), sep="\n")


def write(compared: Comparison, settings: dict, folder: Path | None = None) -> Path:
    """Write NAME-MACHINE.{json,md,svg}, each whole or not at all; returns the Markdown's path."""
    problem = compared.problem
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "settings": settings,
        "environments": _environments(compared),
        "outcomes": [_outcome(compared, o) for o in compared.outcomes],
    }
    page = write_results(
        problem.name, record, heads(compared), rows(compared), notes(compared), folder=folder or FOLDER
    )
    draw(compared, page.with_suffix(".svg"))
    return page


def _outcome(compared: Comparison, outcome) -> dict:
    ratios = {r.group: {"over": r.rival, "times": r.times} for r in compared.ratios(outcome)}
    return outcome.record() | {"labels": dict(compared.problem.case(outcome.case).labels), "speed_ups": ratios}


def _environments(compared: Comparison) -> dict[str, dict[str, str]]:
    """Versions in the environments that gave figures."""
    ran = {o.solver for o in compared.outcomes if o.rounds_ms}
    names = {s.environment for s in compared.problem.solvers if s.name in ran} - {"main"}
    held = {}
    for name in sorted(names):
        try:
            held[name] = installed(name)
        except EnvironmentFailed as error:
            held[name] = {"failed": str(error)}
    return held
