"""The table of a run as plain cells, once: the terminal and the page both print these."""

from __future__ import annotations

from dataclasses import dataclass

from .compare import SAME, best, speedup
from .record import EngineRow, Run, Setting


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        first: of its setting: only there are the setting's own cells filled.
        cells: text per column of `columns`.
        best: the fastest of all at its threads and unit.
        news: "win", "loss" or "same" against the best dense engine.
    """

    setting: Setting
    row: EngineRow | None
    first: bool
    cells: tuple[str, ...]
    best: bool
    news: str


def columns(run: Run) -> tuple[str, ...]:
    """Column heads; the last five belong to an engine, those before to a setting."""
    return ("setting", run.dense.quality_label, "agrees", "disk", "memory", *ENGINE_COLUMNS)


ENGINE_COLUMNS = ("engine", "threads", "latency", "throughput", "vs best dense")


def lines(run: Run) -> list[Line]:
    """Dense first, then the settings in their order; within one, by unit and threads."""
    ordered = sorted(run.settings, key=lambda s: not s.is_dense)
    return [line for setting in ordered for line in _of(run, setting)]


def _of(run: Run, setting: Setting) -> list[Line]:
    rows = [r for r in run.engines if r.setting == setting.name]
    units = list(dict.fromkeys(r.unit for r in rows))
    rows.sort(key=lambda r: (units.index(r.unit), r.threads))
    if not rows:
        return [Line(setting, None, True, (*_setting_cells(setting), *([""] * len(ENGINE_COLUMNS))), False, "same")]
    return [_line(run, setting, row, first=i == 0) for i, row in enumerate(rows)]


def _line(run: Run, setting: Setting, row: EngineRow, *, first: bool) -> Line:
    own = _setting_cells(setting) if first else ("",) * 5
    times = speedup(run, row)
    rivals = (r for r in run.engines if r.threads == row.threads and r.unit == row.unit)
    cells = (
        row.engine,
        str(row.threads),
        f"{number(row.latency_ms)} ms",
        f"{number(row.throughput)} {row.unit}",
        "–" if times is None else f"{times:.2f}×",
    )
    return Line(setting, row, first, (*own, *cells), best(rivals) is row, _news(times))


def _news(times: float | None) -> str:
    if times is None or abs(times - 1) < SAME:
        return "same"
    return "win" if times > 1 else "loss"


def _setting_cells(setting: Setting) -> tuple[str, ...]:
    agreement = "–" if setting.agreement is None else f"{100 * setting.agreement:.1f} %"
    return (setting.name, quality(setting), agreement, megabytes(setting.bytes_disk), megabytes(setting.bytes_memory))


def quality(setting: Setting) -> str:
    """The headline figure as text: "81.4 %" or "17.23"."""
    return f"{100 * setting.score:.1f} %" if setting.quality_unit == "%" else f"{setting.score:.4g}"


def megabytes(size: int) -> str:
    """Bytes as "90.9 MB" (10⁶ bytes)."""
    return f"{size / 1e6:.1f} MB"


def number(value: float) -> str:
    """Three significant digits, without an exponent: "1,230", "12.3", "0.123"."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
