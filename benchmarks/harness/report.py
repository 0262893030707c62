"""A problem's result: printed, and written as JSON, Markdown and SVG beside the machine's name."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.results import FOLDER, write_results
from benchmarks.roofline import Roof, measure

from .compare import Comparison
from .environments import EnvironmentFailed, installed
from .plots import draw
from .tables import aligned, heads, notes, rows


def show(compared: Comparison) -> None:
    """The table and its notes, on the terminal."""
    print("", compared.problem.title, "", aligned(heads(compared), rows(compared)), "", sep="\n")
    print(*(f"- {note}" for note in notes(compared)), sep="\n")


def write(compared: Comparison, settings: dict, folder: Path | None = None) -> Path:
    """Write NAME-MACHINE.{json,md,svg}, each whole or not at all; returns the Markdown's path."""
    problem = compared.problem
    roofs = {threads: measure(threads) for threads in sorted({o.threads for o in compared.outcomes})}
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "settings": settings,
        "environments": _environments(compared),
        "roofs": [asdict(roof) for roof in roofs.values()],
        "outcomes": [_outcome(compared, o) for o in compared.outcomes],
    }
    told = [*notes(compared), *roofline_notes(compared, roofs)]
    page = write_results(problem.name, record, heads(compared), rows(compared), told, folder=folder or FOLDER)
    draw(compared, page.with_suffix(".svg"), roofs)
    return page


def roofline_notes(compared: Comparison, roofs: Mapping[int, Roof]) -> list[str]:
    """What the machine could do at most, and how near each sparse solver came on its worst and best case."""
    lines = []
    for threads, roof in roofs.items():
        peak = f"{roof.fp32_gflops:.0f} GF/s in float32, {roof.memory_gbs:.0f} GB/s from memory"
        where = f"{threads} thread{'s' * (threads > 1)}"
        lines.append(f"roofline, {where}: {peak} (benchmarks/roofline.py)")
        timed = [o for o in compared.outcomes if o.threads == threads and o.usable and o.work]
        for solver in (s.name for s in compared.problem.solvers if s.sparse):
            near = [roof.ms(**o.work) / o.median_ms for o in timed if o.solver == solver]
            if near:
                lines.append(f"{solver}, {where}: {min(near):.0%} to {max(near):.0%} of the roofline")
    return lines


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
