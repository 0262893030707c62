"""Speed-up over the best dense engine against density, on logarithmic axes, with the two lines that bound it.

1/density is what skipping every zero for free would give; the roofline is what the machine allows at most, given the
case's own operations and bytes. One SVG, which follows the reader's light or dark theme.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.roofline import Roof
from gossamer.core.files import whole_file
from gossamer.report.figures import clean, style
from gossamer.report.ink import LIGHT, MARKERS, themed

from .compare import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A panel's width and height, inches.
PANEL = (4.6, 3.4)


def draw(compared: Comparison, path: Path, roofs: Mapping[int, Roof] | None = None) -> Path | None:
    """Write the plot; None where a problem has no densities, no dense engine, or nothing to show.

    Args:
        roofs: by thread count; without them, or without the problem's `work`, no roofline is drawn.
    """
    panels = _panels(compared)
    if not panels:
        return None
    with whole_file(path) as draft:
        draft.write_text(themed(_svg(compared, panels, roofs or {})))
    return path


def _panels(compared: Comparison) -> list[tuple[str, int]]:
    """(values of the problem's PANEL labels, threads) of every plot that has a point."""
    found = [(_panel_of(compared, o.case), o.threads) for o in compared.outcomes if _point(compared, o)]
    return list(dict.fromkeys(found))


def _panel_of(compared: Comparison, case: str) -> str:
    labels = compared.problem.case(case).labels
    return ", ".join(str(labels[name]) for name in compared.problem.panel if name in labels)


def _point(compared: Comparison, outcome) -> tuple[float, float] | None:
    """(density, speed-up over the first group) of a sparse solver."""
    density = compared.problem.case(outcome.case).labels.get("density")
    ratios = compared.ratios(outcome)
    if not density or not ratios or ratios[0].group != next(iter(compared.problem.groups)) or not ratios[0].times:
        return None
    return float(density), ratios[0].times


def _svg(compared: Comparison, panels: list[tuple[str, int]], roofs: Mapping[int, Roof]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    threads = sorted({t for _, t in panels})
    values = list(dict.fromkeys(v for v, _ in panels))
    with matplotlib.rc_context(style(LIGHT)):
        size = (PANEL[0] * len(threads), PANEL[1] * len(values) + 0.5)
        drawn = Figure(figsize=size, layout="constrained")
        grid = drawn.subplots(len(values), len(threads), squeeze=False)
        for i, value in enumerate(values):
            for j, count in enumerate(threads):
                _panel(grid[i][j], compared, value, count, roofs.get(count))
        _legend(drawn, grid)
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return clean(out.getvalue(), prefix=compared.problem.name, title=_words(compared))


def _panel(axes: Axes, compared: Comparison, value: str, threads: int, roof: Roof | None) -> None:
    group = next(iter(compared.problem.groups))
    axes.set_title(f"{value}, {threads} thread{'s' * (threads > 1)}".lstrip(", "))
    axes.set(xscale="log", yscale="log", xlabel="density (fraction kept)", ylabel=f"speed-up over {group}")
    own = [o for o in compared.outcomes if o.threads == threads and _panel_of(compared, o.case) == value]
    for k, solver in enumerate(s.name for s in compared.problem.solvers if s.sparse):
        points = sorted(p for o in own if o.solver == solver and (p := _point(compared, o)))
        if points:
            colour = LIGHT.series[k % len(LIGHT.series)]
            axes.plot(*zip(*points), marker=MARKERS[k % len(MARKERS)], ms=5, color=colour, lw=1.6, label=solver)
    _bounds(axes, compared, own, roof)
    axes.axhline(1.0, color=LIGHT.faint, lw=1)
    axes.yaxis.set_major_locator(_locator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}×")
    axes.yaxis.set_minor_formatter(lambda y, _: "")
    densities = sorted({compared.problem.case(o.case).labels.get("density") for o in own} - {None})
    axes.set_xticks(densities, [f"{d:g}" for d in densities])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()


def _locator():
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1.0, 2.0, 5.0))


def _bounds(axes: Axes, compared: Comparison, own: list, roof: Roof | None) -> None:
    densities = sorted({float(d) for o in own if (d := compared.problem.case(o.case).labels.get("density"))})
    axes.plot(densities, [1 / d for d in densities], color=LIGHT.dense, lw=1, ls=(0, (4, 3)), label="1/density")
    if roof is None:
        return
    points = sorted({p for o in own if (p := _roof_point(compared, o, roof))})
    if points:
        axes.plot(*zip(*points), color=LIGHT.dense, lw=1.2, ls=(0, (1, 2)), label="roofline")


def _roof_point(compared: Comparison, outcome, roof: Roof) -> tuple[float, float] | None:
    """The speed-up that the machine's roofs would allow on this case."""
    density = compared.problem.case(outcome.case).labels.get("density")
    rivals = compared.rivals(next(iter(compared.problem.groups)), outcome.case, outcome.threads)
    if not density or not rivals or not outcome.work:
        return None
    least = roof.ms(**outcome.work)
    return (float(density), min(r.median_ms for r in rivals) / least) if least else None


def _legend(drawn, grid) -> None:
    found = {name: line for row in grid for axes in row for line, name in zip(*axes.get_legend_handles_labels())}
    lines = [n for n in ("1/density", "roofline") if n in found]
    found = {n: found[n] for n in [*(n for n in found if n not in lines), *lines]}
    drawn.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=9)


def _words(compared: Comparison) -> str:
    """The plot for readers who cannot see it."""
    return f"{compared.problem.title}: speed-up against density. {'; '.join(compared.summaries())}."
