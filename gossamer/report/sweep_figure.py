"""The picture of a sweep: the figure that counts against the density, a panel per task, one line per method."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import need
from ..core.files import whole_file
from .figures import clean, style
from .ink import LIGHT, MARKERS, themed
from .sweep import Row, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (5.2, 3.9)
COLUMNS = 2
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)))


def sweep_figure(found: Sweep) -> str:
    """One SVG element, which follows the reader's light or dark theme. Bars are 95 % intervals.

    Raises:
        MissingDependency: matplotlib is missing; install the extra "report".
    """
    with need("matplotlib", "report").rc_context(style(LIGHT)):
        out = io.StringIO()
        _draw(found).savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return themed(clean(out.getvalue(), prefix="sweep", title=_words(found)))


def write_sweep_figure(found: Sweep, path: str | Path) -> Path:
    """Save `sweep_figure` as a file."""
    drawn = sweep_figure(found)
    with whole_file(path) as draft:
        draft.write_text(drawn, encoding="utf-8")
    return Path(path)


def _draw(found: Sweep) -> Figure:
    tasks = list(dict.fromkeys(r.task for r in found.rows))
    methods = list(dict.fromkeys(r.method for r in found.rows if r.kept < 1))
    columns = min(COLUMNS, len(tasks)) or 1
    deep = -(-len(tasks) // columns) or 1
    legend = 0.25 * -(-len(methods) // (2 * columns))
    size = (PANEL[0] * columns, PANEL[1] * deep + legend)
    drawn = need("matplotlib.figure", "report").Figure(figsize=size, layout="constrained")
    places = drawn.subplots(deep, columns, squeeze=False).flatten()
    for axes, task in zip(places, tasks):
        _panel(axes, [r for r in found.rows if r.task == task], methods)
    for axes in places[len(tasks) :]:
        axes.set_visible(False)
    names = {n: line for axes in places for line, n in zip(*axes.get_legend_handles_labels())}
    drawn.legend(names.values(), names.keys(), loc="outside lower center", ncols=2 * columns, fontsize=9)
    return drawn


def _panel(axes: Axes, rows: list[Row], methods: list[str]) -> None:
    first = rows[0]
    axes.set_title(first.title)
    axes.set(xscale="log", xlabel="share of weights kept", ylabel=_label(first))
    for row in (r for r in rows if r.kept >= 1):
        _dense(axes, row)
    for k, method in enumerate(methods):
        own = sorted((r.kept, r.quality.mean, r.quality.half or 0.0) for r in rows if r.method == method)
        if own:
            look = {"color": LIGHT.series[k % len(LIGHT.series)], "marker": MARKERS[k % len(MARKERS)]}
            dashes = LINES[k // len(LIGHT.series) % len(LINES)]
            x, y, half = zip(*own)
            # Methods share their densities: bars side by side can be told apart.
            nudged = [d * 1.012 ** (k - len(methods) / 2) for d in x]
            axes.errorbar(nudged, y, half, ms=5, lw=1.4, elinewidth=0.8, ls=dashes, label=method, **look)
    kept = sorted({round(r.kept, 2) for r in rows if r.kept < 1})
    axes.set_xticks(kept, [f"{d:g}" for d in kept])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    if not first.higher_is_better:
        axes.invert_yaxis()


def _dense(axes: Axes, row: Row) -> None:
    band = row.quality
    axes.axhline(band.mean, color=LIGHT.dense, lw=1.2, ls=(0, (4, 3)), label=row.method)
    if band.half:
        axes.axhspan(band.mean - band.half, band.mean + band.half, color=LIGHT.dense, alpha=0.15, lw=0)


def _label(row: Row) -> str:
    return row.quality_label + ("" if row.higher_is_better else " (lower is better, upwards)")


def _words(found: Sweep) -> str:
    """The picture for readers who cannot see it."""
    told = (f"{r.task}, {r.method}, {r.kept:.3g} kept: {r.quality.text('.4g')}" for r in found.rows)
    return f"Quality against share of weights kept. {'; '.join(told)}."
