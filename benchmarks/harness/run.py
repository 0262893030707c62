"""One problem from beginning to end: blocks, progress, partial file, report."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .compare import Comparison
from .conventions import QUICK, WAITING, Effort
from .gate import Truths
from .outcome import Outcome
from .partial import Partial, key
from .problem import Problem, Solver
from .report import show, write
from .rounds import Block, Rounds, blocks


@dataclass(frozen=True)
class Options:
    """The command line. `only` names solvers; with it, or with `quick`, nothing is written to benchmarks/results/."""

    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    only: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    effort: Effort = field(default_factory=Effort)
    fresh: bool = False
    out: Path | None = None

    @property
    def whole(self) -> bool:
        """Nothing was left out: the result may be kept."""
        return not (self.quick or self.only or self.cases)

    def record(self) -> dict:
        """For the JSON and for telling runs apart."""
        return {
            "quick": self.quick,
            "threads": list(self.threads),
            "only": list(self.only),
            "cases": list(self.cases),
            **(QUICK if self.quick else self.effort).record(),
            "waiting": WAITING,
        }


def run(problem: Problem, options: Options) -> list[Outcome]:
    """Measure a problem, print its table, and write it where it belongs.

    Raises:
        ValueError: `only` or `cases` name what is not there.
        KeyboardInterrupt: stopped; finished blocks are kept and taken up by the next run with the same options.
    """
    solvers, cases = chosen_solvers(problem, options.only), chosen_cases(problem, options)
    partial = Partial.of(problem.name, options.record())
    finished = {} if options.fresh else partial.read()
    if finished:
        print(f"{problem.name}: going on from {partial.path}, {len(finished)} blocks done", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        truths = Truths(problem, Path(folder))
        rounds = Rounds(problem, solvers, QUICK if options.quick else options.effort, truths)
        outcomes = _measure(rounds, blocks(problem, cases, options.threads), finished, partial)
    _add_work(problem, outcomes)
    compared = Comparison(problem, outcomes)
    show(compared)
    if options.whole or options.out:
        print(f"wrote {write(compared, options.record() | {'sittings': 1 + bool(finished)}, options.out)}")
    partial.remove()
    return outcomes


def chosen_solvers(problem: Problem, only: Sequence[str]) -> list[Solver]:
    """Those named, or all."""
    _known("solver", only, [s.name for s in problem.solvers], problem)
    return [s for s in problem.solvers if not only or s.name in only]


def chosen_cases(problem: Problem, options: Options) -> list:
    """Those whose id begins with one of the words given, or all; with --quick only the quick ones."""
    cases = [c for c in problem.cases if not options.cases or c.id.startswith(tuple(options.cases))]
    if not cases:
        _known("case", options.cases, [c.id for c in problem.cases], problem)
    return [c for c in cases if c.quick or not options.quick]


def _known(kind: str, asked: Sequence[str], there: Sequence[str], problem: Problem) -> None:
    if missing := set(asked) - set(there):
        raise ValueError(f"{problem.name} has no {kind} {', '.join(sorted(missing))}; there are {', '.join(there)}")


def _measure(rounds: Rounds, todo: list[Block], finished: dict[str, list[Outcome]], partial: Partial) -> list[Outcome]:
    left = [block for block in todo if key(block) not in finished]
    with _progress() as progress:
        task = progress.add_task(rounds.problem.name, total=sum(rounds.steps(b) for b in left))
        timed = replace(rounds, tick=lambda what: progress.update(task, advance=1, description=what))
        for block in left:
            finished[key(block)] = timed.measure(block)
            partial.keep(finished)
    return [outcome for block in todo for outcome in finished[key(block)]]


def _progress() -> Progress:
    """On the error stream, with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def _add_work(problem: Problem, outcomes: list[Outcome]) -> None:
    """Kept operations and bytes of each case, counted once."""
    if not hasattr(problem.module, "work"):
        return
    held: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        case = problem.case(outcome.case)
        if case.id not in held:
            held[case.id] = problem.work(case, problem.module.build(case))
        outcome.work = held[case.id]
