"""The plots of a run. Each is drawn twice, on light and on dark paper, as SVG whose text stays text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import FormatError, need, unknown
from ..core.files import whole_file
from .ink import MARKERS, Ink, ink
from .lines import megabytes, number
from .record import EngineRow, LayerRow, Run, Setting
from .scatter import PT_PER_LETTER, Point, scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FONT = "ui-sans-serif, system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
SMALL, WIDE = (5.6, 3.7), (10.4, 1.75)
# Size and speed stand side by side, so they are equally high.
_HEIGHT_OF_TWO = 5.8


def figure(run: Run, kind: str, *, dark: bool = False) -> str:
    """One plot of a run as an SVG element, ready to be put into a page.

    Args:
        kind: "size", "speed", "latency", "layers" or "layer_ms".
        dark: for dark paper.

    Raises:
        UnknownName: no such plot; near names are listed.
        FormatError: the run holds nothing to draw in it.
        MissingDependency: matplotlib is missing; install the extra "report".
    """
    with need("matplotlib", "report").rc_context(style(ink(dark))):
        drawn = _draw(run, kind, ink(dark))
        out = io.StringIO()
        drawn.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return clean(out.getvalue(), prefix=f"{kind}-{'dark' if dark else 'light'}", title=describe(run, kind))


def write_png(run: Run, kind: str, path: str | Path, *, dark: bool = False, dpi: int = 160) -> Path:
    """Save one plot as a PNG (for places that cannot show SVG).

    Args:
        dpi: pixels per inch of a plot 5.6 or 10.4 inches wide.
    """
    with need("matplotlib", "report").rc_context(style(ink(dark))), whole_file(path) as draft:
        _draw(run, kind, ink(dark)).savefig(draft, format="png", dpi=dpi, facecolor="#14191d" if dark else "white")
    return Path(path)


def describe(run: Run, kind: str) -> str:
    """What the plot shows, in words, for readers who cannot see it."""
    label = run.dense.quality_label
    if kind == "size":
        points = (f"{s.name}: {megabytes(s.bytes_disk)}, {s.score:.4g}" for s in run.settings)
        return f"{label} against size on disk. {'; '.join(points)}."
    if kind in ("speed", "latency"):
        told = (f"{r.setting} in {r.engine}, {r.threads} threads: {_pace(r, kind)}" for r in run.engines)
        return f"{label} against {'throughput' if kind == 'speed' else 'latency'}. {'; '.join(told)}."
    what = "density kept and kernel chosen" if kind == "layers" else "milliseconds, dense and as chosen,"
    return f"{what} for each layer; the table of layers holds the same figures."


def _pace(row: EngineRow, kind: str) -> str:
    return f"{number(row.throughput)} {row.unit}" if kind == "speed" else f"{number(row.latency_ms)} ms"


def available(run: Run) -> list[str]:
    """The plots that this run has something to show in."""
    kinds = ["size", *(("speed", "latency") if run.engines else ())]
    kinds += ["layers"] if run.layers else []
    return kinds + (["layer_ms"] if any(r.chosen_ms is not None for r in run.layers) else [])


def _draw(run: Run, kind: str, pen: Ink) -> Figure:
    if kind not in FIGURES:
        raise unknown("figure", kind, FIGURES)
    if kind not in available(run):
        raise FormatError(f"the run holds nothing to draw in figure {kind!r}; it has {', '.join(available(run))}")
    return FIGURES[kind](run, pen)


def style(pen: Ink) -> dict[str, object]:
    """matplotlib's settings for one theme."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "gossamer",
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": pen.text,
        "axes.labelcolor": pen.faint,
        "axes.edgecolor": pen.grid,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": pen.grid,
        "grid.linewidth": 0.8,
        "xtick.color": pen.faint,
        "ytick.color": pen.faint,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "legend.frameon": False,
        "axes.facecolor": "none",
    }


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figures = need("matplotlib.figure", "report")
    drawn = figures.Figure(figsize=(size[0], size[1] * count), layout="constrained")
    return drawn, list(drawn.subplots(count, 1, squeeze=False)[:, 0])


def _colours(run: Run, pen: Ink) -> dict[str, str]:
    sparse = [s.name for s in run.settings if not s.is_dense]
    own = {name: pen.series[i % len(pen.series)] for i, name in enumerate(sparse)}
    return {s.name: own.get(s.name, pen.dense) for s in run.settings}


def _size(run: Run, pen: Ink) -> Figure:
    panels = len({(r.unit, r.threads) for r in run.engines})
    drawn, (axes,) = _panels(1, (SMALL[0], _HEIGHT_OF_TWO if panels > 1 else SMALL[1]))
    colours = _colours(run, pen)
    points = [Point(s.bytes_disk / 1e6, s.score, s.name, colours[s.name], "o", s.is_dense) for s in run.settings]
    scatter(axes, points, "size on disk, MB", run.dense, pen)
    return drawn


def _speed(run: Run, pen: Ink) -> Figure:
    return _by_engine(run, pen, "throughput, {unit}", lambda row: row.throughput)


def _latency(run: Run, pen: Ink) -> Figure:
    return _by_engine(run, pen, "median latency, ms", lambda row: row.latency_ms)


def _by_engine(run: Run, pen: Ink, label: str, x_of: Callable[[EngineRow], float]) -> Figure:
    """A panel per unit and thread count; engines differ by marker, which a legend names, the settings by colour."""
    groups = list(dict.fromkeys((r.unit, r.threads) for r in run.engines))
    engines = list(dict.fromkeys(r.engine for r in sorted(run.engines, key=lambda r: run.setting(r.setting).is_dense)))
    marks = {engine: MARKERS[i % len(MARKERS)] for i, engine in enumerate(engines)}
    colours = _colours(run, pen)
    drawn, panels = _panels(len(groups), (SMALL[0], SMALL[1] if len(groups) == 1 else _HEIGHT_OF_TWO / 2))
    for axes, (unit, threads) in zip(panels, groups):
        points, rows = [], [r for r in run.engines if (r.unit, r.threads) == (unit, threads)]
        for row in rows:
            setting, marker = run.setting(row.setting), marks[row.engine]
            text = "" if setting.is_dense else _label_of(row, rows)
            points.append(Point(x_of(row), setting.score, text, colours[setting.name], marker, setting.is_dense))
        scatter(axes, points, label.format(unit=unit), run.dense, pen)
        axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}" + (f", {unit}" if len(groups) > 2 else ""))
    _tell_apart(drawn, panels[0], marks, run, pen)
    return drawn


def _starred(row: EngineRow) -> str:
    """A dense engine that rounds further than fp32 is starred: its quality was not measured."""
    return row.engine if row.precision == "fp32" else f"{row.engine}*"


def _label_of(row: EngineRow, rows: Sequence[EngineRow]) -> str:
    """The setting's name, at the fastest of the engines that ran it: markers tell the others."""
    best = max((r for r in rows if r.setting == row.setting), key=lambda r: r.throughput)
    return row.setting if row is best else ""


def _tell_apart(drawn: Figure, axes: Axes, marks: Mapping[str, str], run: Run, pen: Ink) -> None:
    """A legend of the dense engines' markers, which stand in one line, and of our own where there are several."""
    dense = {r.engine: _starred(r) for r in run.engines if run.setting(r.setting).is_dense}
    own = [e for e in marks if e not in dense]
    faces = {name: "none" for name in dense.values()} | {e: pen.faint for e in own if len(own) > 1}
    of = {name: marks[e] for e, name in dense.items()} | marks
    keys = [axes.plot([], [], of[n], ms=7, mfc=f, mec=pen.faint, ls="", label=n)[0] for n, f in faces.items()]
    drawn.legend(handles=keys, loc="outside lower center", ncols=3, fontsize=9, handletextpad=0.2)


def _grouped(run: Run) -> list[tuple[Setting, list[LayerRow]]]:
    rows = [(s, [r for r in run.layers if r.setting == s.name]) for s in run.settings]
    return [(s, r) for s, r in rows if r]


def _kernel(row: LayerRow) -> str:
    return row.format if row.format == row.backend or not row.backend else f"{row.format} · {row.backend}"


def _layers(run: Run, pen: Ink) -> Figure:
    groups = _grouped(run)
    kernels = list(dict.fromkeys(_kernel(r) for _, rows in groups for r in rows if r.packed))
    colours = {k: pen.series[i % len(pen.series)] for i, k in enumerate(kernels)}
    drawn, panels = _panels(len(groups), WIDE)
    for axes, (setting, rows) in zip(panels, groups):
        for kernel in dict.fromkeys(_kernel(r) for r in rows):
            at = [i for i, r in enumerate(rows) if _kernel(r) == kernel]
            colour = colours.get(kernel, pen.dense)
            axes.bar(at, [100 * rows[i].density for i in at], width=0.8, color=colour, label=kernel)
        _layer_axis(axes, setting, rows)
        axes.set_ylabel("kept, %")
        axes.set_ylim(0, max(10.0, *(108 * r.density for r in rows)))
        _legend(axes, setting)
    return drawn


def _layer_ms(run: Run, pen: Ink) -> Figure:
    groups = [(s, rows) for s, rows in _grouped(run) if any(r.chosen_ms is not None for r in rows)]
    drawn, panels = _panels(len(groups), WIDE)
    series = (
        ("dense in torch", "dense_ms", "_", pen.dense),
        ("best dense", "best_dense_ms", "s", pen.series[1]),
        ("as chosen", "chosen_ms", "o", pen.series[0]),
    )
    for axes, (setting, rows) in zip(panels, groups):
        for label, name, marker, colour in series:
            at = [(i, getattr(r, name)) for i, r in enumerate(rows) if getattr(r, name) is not None]
            if at:
                face = "none" if marker == "s" else colour
                axes.plot(*zip(*at), marker, ms=4.5, mec=colour, mfc=face, mew=1.4, label=label)
        _layer_axis(axes, setting, rows)
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        _legend(axes, setting)
    return drawn


def _layer_axis(axes: Axes, setting: Setting, rows: Sequence[LayerRow]) -> None:
    axes.set_title(setting.name)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", visible=False)
    starts = _blocks(rows)
    axes.set_xticks([i for i, _ in starts], [text for _, text in starts], ha="left", fontsize=8.5)


def _legend(axes: Axes, setting: Setting) -> None:
    """On the title's line, right after it, so that a narrow window shows both."""
    x = 0.03 + 1.15 * PT_PER_LETTER * len(setting.name) / (72 * WIDE[0])
    axes.legend(loc="lower left", bbox_to_anchor=(x, 0.97), ncols=5, fontsize=9, handlelength=1, borderpad=0)


def _blocks(rows: Sequence[LayerRow]) -> list[tuple[float, str]]:
    """Ticks where a new numbered block of the model begins, at most a dozen; without numbers, every few layers."""
    numbers = [re.search(r"\.(\d+)\.", r.name) for r in rows]
    starts: list[tuple[float, str]] = []
    for i, found in enumerate(numbers):
        text = f"block {found.group(1)}" if found else ""
        if text and (not starts or starts[-1][1] != text):
            starts.append((i - 0.4, text))
    if len(starts) < 2:
        starts = [(i - 0.4, f"layer {i}") for i in range(len(rows))]
    return starts[:: -(-len(starts) // 12)]


def clean(svg: str, *, prefix: str, title: str) -> str:
    """Leave what a page needs: no prolog, no metadata, ids of our own, fonts of the reader's system."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)
    svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", FONT, svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    named = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{named}"', 1)


FIGURES: dict[str, Callable[[Run, Ink], Figure]] = {
    "size": _size,
    "speed": _speed,
    "latency": _latency,
    "layers": _layers,
    "layer_ms": _layer_ms,
}
