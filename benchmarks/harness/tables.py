"""The table of a run as plain cells, and the notes under it."""

from __future__ import annotations

from .compare import Comparison, Ratio
from .outcome import Outcome

EMPTY = "–"


def heads(compared: Comparison) -> list[str]:
    """Labels, threads, solver, time, noise, rate, further measures, and a speed-up per group."""
    problem = compared.problem
    rate = ["kept GF/s"] if any(_flops(o) for o in compared.outcomes) else []
    figures = ["ms", "noise", *rate, *problem.measures.values()]
    return [*_labels(compared), "threads", "solver", *figures, *(f"over {g}" for g in _measured(compared))]


def aligned(columns: list[str], cells: list[list[str]]) -> str:
    """The table for a terminal: columns padded, nothing folded."""
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in [columns, *cells])


def rows(compared: Comparison) -> list[list[str]]:
    """One per solver and case that gave a time, fastest first within a case."""
    order = [c.id for c in compared.problem.cases]
    shown = [o for o in compared.outcomes if o.rounds_ms]
    shown.sort(key=lambda o: (o.threads, order.index(o.case), o.median_ms))
    return [_row(compared, o, heads(compared)) for o in shown]


def notes(compared: Comparison) -> list[str]:
    """How to read the table, who was refused and why, the means."""
    refused = sorted(
        {f"{o.solver} on {o.case}, {o.threads} threads: {o.why_not}" for o in compared.outcomes if o.why_not}
    )
    return [
        "ms: median of the rounds' medians; noise: their interquartile range over it; a speed-up is against the "
        "fastest of its group with the same threads, and left out where either side's numbers were wrong",
        *compared.summaries(),
        *(f"refused: {text}" for text in refused),
    ]


def _labels(compared: Comparison) -> list[str]:
    return list(dict.fromkeys(label for case in compared.problem.cases for label in case.labels))


def _measured(compared: Comparison) -> list[str]:
    """Groups of which at least one member gave a time."""
    ran = {o.solver for o in compared.outcomes if o.rounds_ms}
    return [group for group, members in compared.problem.groups.items() if ran & set(members)]


def _row(compared: Comparison, o: Outcome, columns: list[str]) -> list[str]:
    problem = compared.problem
    labels = problem.case(o.case).labels
    cells = {name: str(labels.get(name, "")) for name in _labels(compared)}
    cells |= {"threads": str(o.threads), "solver": o.solver, "ms": f"{o.median_ms:.3f}", "noise": f"{o.noise:.0%}"}
    if compared.sparse[o.solver] and _flops(o):
        cells["kept GF/s"] = f"{_flops(o) / o.median_ms / 1e6:.0f}"
    cells |= {title: _measure(compared, o, name) for name, title in problem.measures.items()}
    cells |= {f"over {r.group}": _times(r, len(problem.groups[r.group])) for r in compared.ratios(o)}
    return [cells.get(name, "") for name in columns]


def _flops(o: Outcome) -> float:
    return o.work.get("flops", 0.0) + o.work.get("bf16_flops", 0.0)


def _measure(compared: Comparison, o: Outcome, name: str) -> str:
    if name not in o.measures:
        return EMPTY
    less = compared.less(o, name)
    return f"{o.measures[name]:,.4g}" + (f" ({less:.2f}× less)" if less else "")


def _times(ratio: Ratio, rivals: int) -> str:
    """The ratio, and whose time it is where the group has several members."""
    if ratio.times is None:
        return EMPTY
    return f"{ratio.times:.2f}×" + (f" ({ratio.rival})" if rivals > 1 else "")
