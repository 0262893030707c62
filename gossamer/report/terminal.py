"""The table of a run for the terminal: a line per setting with what it costs, a line per engine with what it gains."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import headline
from .lines import Line, lines
from .record import Run

_STYLE = {"win": "green", "loss": "red", "same": ""}


def table(run: Run) -> Table:
    """The run as a rich table: dense first, the fastest engine bold, losing entries in red and below 1×.

    Example:
        >>> rich.print(table(load_run("run.json")))                                # doctest: +SKIP
    """
    units = list(dict.fromkeys(row.unit for row in run.engines))
    drawn = Table(title=run.title, caption=headline(run), box=box.SIMPLE_HEAD, padding=0)
    drawn.title_justify = "left"
    pace = units[0].replace("/", " /") if len(units) == 1 else "throughput"
    drawn.add_column("", overflow="fold")
    costs = (run.dense.quality_label, "agrees %", "disk MB", "memory MB")
    for name in (*costs, "threads", "latency ms", pace, "vs best dense"):
        drawn.add_column(name.replace(" ", "\n"), justify="right", overflow="fold", vertical="bottom")
    for line in lines(run):
        if line.first:
            _add_setting(drawn, line)
        if line.row is not None:
            _add_engine(drawn, line, unit=len(units) > 1)
    return drawn


def _add_setting(drawn: Table, line: Line) -> None:
    if drawn.row_count:
        drawn.add_section()
    name, quality, agrees, disk, memory = line.cells[:5]
    drawn.add_row(Text(name, "bold"), quality, _bare(agrees), _bare(disk), _bare(memory))


def _add_engine(drawn: Table, line: Line, *, unit: bool) -> None:
    engine, threads, latency, pace, times = line.cells[5:]
    name = f"  {engine}, {line.row.unit}" if unit and line.row else f"  {engine}"
    style = "bold" if line.best else ""
    drawn.add_row(
        name, "", "", "", "", threads, _bare(latency), _bare(pace), Text(times, _STYLE[line.news]), style=style
    )


def _bare(cell: str) -> str:
    """A figure without its unit, which stands in the head of the column."""
    return cell.split(" ")[0]
