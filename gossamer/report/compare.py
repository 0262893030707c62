"""The comparisons that a report makes: against the best dense engine, and in words that state losses as plainly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .record import EngineRow, Run, Setting

# Closer than this, two medians on a shared machine are the same.
SAME = 0.03
POINTS_OF_GRACE = 0.01
RATIO_OF_GRACE = 1.10


def best(rows: Iterable[EngineRow]) -> EngineRow | None:
    """The row with the highest throughput."""
    return max(rows, key=lambda row: row.throughput, default=None)


def best_dense(run: Run, threads: int, unit: str, *, precision: str = "fp32") -> EngineRow | None:
    """The fastest engine that ran the dense model with as many threads, in that precision."""
    dense = {s.name for s in run.settings if s.is_dense}
    rows = (r for r in run.engines if r.setting in dense and r.precision == precision)
    return best(r for r in rows if r.threads == threads and r.unit == unit)


def speedup(run: Run, row: EngineRow) -> float | None:
    """throughput(row) / throughput(best dense fp32 engine at the same threads); None where none was measured."""
    rival = best_dense(run, row.threads, row.unit)
    return None if rival is None or rival.throughput <= 0 else row.throughput / rival.throughput


@dataclass(frozen=True)
class Phrase:
    """A comparison: its figure, what the figure is of, and whether it is good news ("win", "loss", "same")."""

    figure: str
    rest: str
    news: str

    @property
    def text(self) -> str:
        """Both together: "2.1× faster than openvino (2 threads)"."""
        return f"{self.figure} {self.rest}"


@dataclass(frozen=True)
class Verdict:
    """What one setting gained and lost."""

    setting: Setting
    phrases: tuple[Phrase, ...]

    @property
    def sentence(self) -> str:
        """One line: "4-row, 80 %: 2.1× faster than openvino (2 threads), 3.9× smaller on disk, −0.7 points"."""
        return f"{self.setting.name}: {', '.join(p.text for p in self.phrases)}"


def verdicts(run: Run) -> list[Verdict]:
    """One verdict per setting that is not dense."""
    return [Verdict(s, tuple(_phrases(run, s))) for s in run.settings if not s.is_dense]


def headline(run: Run) -> str:
    """The one sentence on top: the fastest setting whose quality loss is small, or the one that lost least."""
    sparse = [s for s in run.settings if not s.is_dense]
    if not sparse:
        return f"{run.dense.name}: nothing was made sparse in this run"
    small = [s for s in sparse if loss(run, s) <= 1.0]
    chosen = max(small, key=lambda s: _pace(run, s)) if small else min(sparse, key=lambda s: loss(run, s))
    return next(v for v in verdicts(run) if v.setting is chosen).sentence


def loss(run: Run, setting: Setting) -> float:
    """Quality lost, in units of what passes as small: 1 point, or 10 % of a plain figure."""
    dense, own = run.dense.score, setting.score
    if setting.quality_unit == "%":
        return (dense - own if setting.higher_is_better else own - dense) / POINTS_OF_GRACE
    ratio = _ratio(dense, own) if setting.higher_is_better else _ratio(own, dense)
    return (ratio - 1.0) / (RATIO_OF_GRACE - 1.0)


def fastest(run: Run, setting: Setting, unit: str) -> EngineRow:
    """This setting's row that the headline speaks of: at its most threads, its best engine."""
    rows = [r for r in run.engines if r.setting == setting.name and r.unit == unit]
    return max(rows, key=lambda r: (r.threads, r.throughput))


def _pace(run: Run, setting: Setting) -> float:
    first = next((r.unit for r in run.engines if r.setting == setting.name), None)
    return 0.0 if first is None else speedup(run, fastest(run, setting, first)) or 0.0


def _phrases(run: Run, setting: Setting) -> Iterable[Phrase]:
    units = list(dict.fromkeys(r.unit for r in run.engines if r.setting == setting.name))
    for unit in units:
        row = fastest(run, setting, unit)
        rivals = (best_dense(run, row.threads, unit, precision=p) for p in _precisions(run))
        for rival in filter(None, rivals):
            how = f"{row.threads} thread{'s' if row.threads > 1 else ''}" + (
                f", {_kind(unit)}" if len(units) > 1 else ""
            )
            against = f"{rival.engine} ({how})"
            times = _ratio(row.throughput, rival.throughput)
            yield _times(times, f"faster than {against}", f"slower than {against}", f"the speed of {against}")
    smaller = _ratio(run.dense.bytes_disk, setting.bytes_disk)
    yield _times(smaller, "smaller on disk", "larger on disk", "the size on disk")
    yield _quality(run.dense, setting)


def _precisions(run: Run) -> list[str]:
    """fp32 first: what the sparse model computes in. Rounding engines follow, so that none is left unsaid."""
    return sorted({"fp32", *(r.precision for r in run.engines)}, key=lambda p: (p != "fp32", p))


def _kind(unit: str) -> str:
    """What sets a unit apart from the others: "prompt" of "tokens/s (prompt)"."""
    return unit.partition("(")[2].rstrip(")") or unit


def _times(ratio: float, better: str, worse: str, same: str) -> Phrase:
    """A ratio as "2.1× faster" or "1.3× slower": never below 1, so that a loss cannot be misread as a gain."""
    if abs(ratio - 1.0) < SAME:
        return Phrase("1.0×", same, "same")
    if ratio > 1.0:
        return Phrase(f"{_short(ratio)}×", better, "win")
    return Phrase(f"{_short(_ratio(1.0, ratio))}×", worse, "loss")


def _short(times: float) -> str:
    if times >= 10:
        return f"{times:.0f}"
    return f"{times:.2f}" if times < 1.1 else f"{times:.1f}"


def _quality(dense: Setting, setting: Setting) -> Phrase:
    if setting.quality_unit == "%":
        change, rest = round(100 * (setting.score - dense.score), 1), f"points of {setting.quality_label}"
        figure = signed(change)
    else:
        times = _ratio(setting.score, dense.score)
        change = round(100 * (times - 1.0), 1)
        rest = f"{setting.quality_label} ({setting.score:.4g} against {dense.score:.4g})"
        figure = f"{signed(change)} %"
        if times >= 2:
            figure, rest = f"{_short(times)}×", f"the {rest}"
    gain = change if setting.higher_is_better else -change
    return Phrase(figure, rest, "same" if gain == 0 else "win" if gain > 0 else "loss")


def signed(value: float) -> str:
    """One decimal, with a real minus sign and an explicit plus: "−0.7", "+0.2", "0.0"."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{abs(value):.1f}"


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("inf")
