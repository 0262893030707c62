"""scatter: quality against size or speed, labels where they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .ink import Ink
from .record import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Labels are placed before any renderer exists, so their width is estimated: DejaVu's mean advance at 9 pt.
PT_PER_LETTER, PT_PER_LINE = 5.6, 11.0


@dataclass(frozen=True)
class Point:
    """One marker of a scatter plot and its label."""

    x: float
    y: float
    label: str
    colour: str
    marker: str
    hollow: bool = False


def scatter(axes: Axes, points: Sequence[Point], label: str, dense: Setting, pen: Ink) -> None:
    """Draw the points, upwards is better; a dashed line stands at the dense model's quality.

    Args:
        label: of the horizontal axis.
    """
    ys = [p.y for p in points]
    if min(ys) > 0 and max(ys) / min(ys) > 5 and dense.quality_unit != "%":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    for p in points:
        face = "none" if p.hollow else p.colour
        axes.plot(p.x, p.y, p.marker, ms=8, mfc=face, mec=p.colour, mew=1.8, clip_on=False, zorder=3)
    axes.axhline(dense.score, color=pen.dense, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set_xlim(0, 1.18 * max(p.x for p in points))
    axes.margins(y=0.22)
    axes.set_xlabel(label)
    axes.set_ylabel(dense.quality_label + ("" if dense.higher_is_better else " (lower is better)"))
    if dense.quality_unit == "%":
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
    if not dense.higher_is_better:
        axes.invert_yaxis()
    _label(axes, points, dense.score)


def _label(axes: Axes, points: Sequence[Point], line: float) -> None:
    """Write each label beside its marker, in the first place around it where it covers no other, nor the dense line."""
    axes.figure.draw_without_rendering()
    per_pt = axes.figure.dpi / 72
    at = [tuple(c / per_pt for c in axes.transData.transform((p.x, p.y))) for p in points]
    left, right = (axes.bbox.x0 / per_pt, axes.figure.bbox.x1 / per_pt)
    height = axes.transData.transform((0, line))[1] / per_pt
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at] + [(left, height - 1, right, height + 1)]
    for p, (x, y) in zip(points, at):
        if not p.label:
            continue
        width = PT_PER_LETTER * len(p.label)
        places = [(9, -3.5), (-9 - width, -3.5), (-width / 2, 9), (-width / 2, -17), (7, 8), (-7 - width, 8)]
        places += [(7, -16), (-7 - width, -16), (-width / 2, 21), (-width / 2, -29), (7, 20), (7, -28)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + PT_PER_LINE) for dx, dy in places]
        inside = [b for b in boxes if b[0] >= left and b[2] <= right]
        box = next((b for b in inside if not any(_meet(b, t) for t in taken)), (inside or boxes)[0])
        taken.append(box)
        axes.annotate(p.label, (p.x, p.y), (box[0] - x, box[1] - y), textcoords="offset points", fontsize=9)


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
