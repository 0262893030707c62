"""report.html: one file that holds everything, readable offline, on light and dark paper, and in print."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import need
from ..core.files import whole_file
from .compare import headline, verdicts
from .figures import available, figure
from .lines import ENGINE_COLUMNS, columns, lines, number
from .record import LayerRow, Run, write_run

_HERE = Path(__file__).parent

CAPTIONS = {
    "size": ("Quality and size", "Up and to the left is better. The dashed line is the dense model."),
    "speed": (
        "Quality and throughput",
        "Up and to the right is better. Hollow marks: the dense model in each engine; * rounds further than fp32, "
        "its quality was not measured and is drawn at the fp32 model's.",
    ),
    "layers": ("What was kept in each layer, and how it is stored", "Bars: weights kept. Colour: format and kernel."),
    "layer_ms": ("What each layer costs", "Lower is better. Where the best dense product wins, dense is what runs."),
}
# Latency is throughput seen in a mirror: the table holds it, and `figure` draws it for who wants it.
TRADE_OFF, LAYERS = ("size", "speed"), ("layers", "layer_ms")


def write_report(run: Run, path: str | Path) -> Path:
    """Write the page, and `run.json` with its numbers beside it.

    Args:
        path: of the page, such as "out/report.html"; its folder is made if missing.

    Returns:
        The path of the page.

    Raises:
        MissingDependency: matplotlib or jinja2 is missing; install the extra "report".

    Example:
        >>> write_report(load_run("run.json"), "report.html")                      # doctest: +SKIP
        PosixPath('report.html')
    """
    page = render(run)
    with whole_file(path) as draft:
        draft.write_text(page, encoding="utf-8")
    write_run(run, Path(path).with_name("run.json"))
    return Path(path)


def render(run: Run) -> str:
    """The page as text."""
    jinja2 = need("jinja2", "report")
    room = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    room.filters["ms"] = lambda value: "–" if value is None else number(value)
    return room.get_template("page.html").render(_facts(run))


def _facts(run: Run) -> dict[str, object]:
    """Everything the template prints; it computes nothing itself."""
    return {
        "run": run,
        "css": (_HERE / "page.css").read_text(encoding="utf-8"),
        "headline": headline(run),
        "verdicts": verdicts(run),
        "columns": columns(run),
        "engine_columns": len(ENGINE_COLUMNS),
        "lines": lines(run),
        "plots": [_plot(run, kind) for kind in TRADE_OFF if kind in available(run)],
        "layer_plots": [_plot(run, kind) for kind in LAYERS if kind in available(run)],
        "layers": [(s, rows) for s in run.settings if (rows := [r for r in run.layers if r.setting == s.name])],
        "unpacked": _unpacked(run),
        "others": _other_figures(run),
        "row_notes": list(dict.fromkeys(f"{r.engine}: {r.note}" for r in run.engines if r.note)),
    }


def _plot(run: Run, kind: str) -> dict[str, str]:
    title, caption = CAPTIONS[kind]
    if not run.dense.higher_is_better and kind in TRADE_OFF:
        caption += f" The axis of {run.dense.quality_label} points down, so that up is better here too."
    return {
        "kind": kind,
        "title": title,
        "caption": caption,
        "light": figure(run, kind),
        "dark": figure(run, kind, dark=True),
    }


def _unpacked(run: Run) -> list[tuple[str, str, list[LayerRow]]]:
    """Layers left dense in a sparse setting, by setting and reason."""
    groups: dict[tuple[str, str], list[LayerRow]] = {}
    for row in run.layers:
        if not row.packed and not run.setting(row.setting).is_dense:
            groups.setdefault((row.setting, row.reason or "no reason was recorded"), []).append(row)
    return [(setting, reason, rows) for (setting, reason), rows in groups.items()]


def _other_figures(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Quality figures that the headline does not use, by their label."""
    labels = dict.fromkeys(k for s in run.settings for k in s.quality if k != s.quality_label)
    return [(k, [(s.name, f"{s.quality[k]:.4g}") for s in run.settings if k in s.quality]) for k in labels]
