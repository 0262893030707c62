"""Speed-ups: a solver against the best of each group of rivals, never against or for one whose numbers were wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .outcome import Outcome, geometric_mean
from .problem import Problem


@dataclass(frozen=True)
class Ratio:
    """How many times `rival`, the best of `group`, takes what the solver takes; None if a side is missing or wrong."""

    group: str
    rival: str | None
    times: float | None


class Comparison:
    """All outcomes of a problem, and the ratios between them."""

    def __init__(self, problem: Problem, outcomes: Iterable[Outcome]) -> None:
        self.problem, self.outcomes = problem, list(outcomes)
        self.by_key = {o.key: o for o in self.outcomes}
        self.sparse = {s.name: s.sparse for s in problem.solvers}

    def rivals(self, group: str, case: str, threads: int) -> list[Outcome]:
        """The usable members of a group for a case: sparse ones on itself, dense ones on its dense case."""
        dense = self.problem.dense_case(self.problem.case(case)).id
        keys = [(m, case if self.sparse[m] else dense, threads) for m in self.problem.groups[group]]
        return [self.by_key[k] for k in keys if k in self.by_key and self.by_key[k].usable]

    def ratio(self, ours: Outcome, group: str) -> Ratio:
        """The fastest rival's time over ours."""
        best = min(self.rivals(group, ours.case, ours.threads), key=lambda o: o.median_ms, default=None)
        if best is None or not ours.usable:
            return Ratio(group, best.solver if best else None, None)
        return Ratio(group, best.solver, best.median_ms / ours.median_ms)

    def ratios(self, ours: Outcome) -> list[Ratio]:
        """One per group that a sparse solver is not a member of; who multiplies zeros is a rival only."""
        groups = self.problem.groups.items() if self.sparse[ours.solver] else ()
        return [self.ratio(ours, g) for g, members in groups if ours.solver not in members]

    def less(self, ours: Outcome, measure: str) -> float | None:
        """The first group's smallest figure over ours, for measures other than time."""
        group = next(iter(self.problem.groups), None)
        if group is None or ours.solver in self.problem.groups[group] or not ours.measures.get(measure):
            return None
        values = [o.measures[measure] for o in self.rivals(group, ours.case, ours.threads) if measure in o.measures]
        return min(values) / ours.measures[measure] if values and ours.usable else None

    def summaries(self) -> list[str]:
        """Per sparse solver, group and thread count: the geometric mean of its speed-ups, its worst and best cell."""
        pairs = [(s.name, g) for s in self.problem.solvers if s.sparse for g in self.problem.groups]
        return [
            text for solver, g in pairs if solver not in self.problem.groups[g] for text in self._summary(solver, g)
        ]

    def _summary(self, solver: str, group: str) -> list[str]:
        lines = []
        for threads in sorted({o.threads for o in self.outcomes}):
            mine = [o for o in self.outcomes if o.solver == solver and o.threads == threads]
            times = [t for o in mine if (t := self.ratio(o, group).times) is not None]
            if times:
                mean = f"geometric mean {geometric_mean(times):.2f}×, {min(times):.2f} to {max(times):.2f}"
                cells = f"{len(times)} cell{'s' * (len(times) > 1)}"
                lines.append(f"{solver} over {group}, {threads} thread{'s' * (threads > 1)}: {mean} in {cells}")
        return lines
