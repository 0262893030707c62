"""Interleaved rounds: all solvers of a block of cases in turn, each in its own process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .contract import Case
from .conventions import Effort
from .environments import EnvironmentFailed, python_of
from .gate import ExportFailed, Truths
from .outcome import Outcome
from .peer import Peer
from .problem import Problem, Solver


@dataclass(frozen=True)
class Block:
    """Cases that are compared with one another (they share a dense case), at one thread count."""

    name: str
    threads: int
    cases: tuple[Case, ...]


def blocks(problem: Problem, cases: Iterable[Case], threads: Sequence[int]) -> list[Block]:
    """All cases in blocks, in the problem's order. A dense case joins the cases that need it."""
    grouped: dict[str, list[Case]] = {}
    for case in cases:
        dense = problem.dense_case(case)
        members = grouped.setdefault(dense.id, [])
        members += [c for c in (case, dense) if c not in members]
    order = problem.cases.index
    return [Block(name, t, tuple(sorted(c, key=order))) for t in threads for name, c in grouped.items()]


@dataclass
class Rounds:
    """Measures blocks. `tick` is called after every answer, with what was asked."""

    problem: Problem
    solvers: Sequence[Solver]
    effort: Effort
    truths: Truths
    tick: Callable[[str], None] = lambda what: None

    def steps(self, block: Block) -> int:
        """How many ticks a block takes, if all goes well."""
        return self.effort.rounds * len(list(self._pairs(block)))

    def measure(self, block: Block) -> list[Outcome]:
        """Visit every solver on every case of the block, round after round."""
        outcomes = {(s.name, c.id): self._blank(s, c, block.threads) for s, c in self._pairs(block)}
        peers = self._peers(block, outcomes)
        try:
            for number in range(self.effort.rounds):
                for solver, case in self._order(block, number):
                    self._visit(solver, case, number, outcomes[solver.name, case.id], peers.get(solver.name))
        finally:
            for peer in peers.values():
                peer.stop()
        return list(outcomes.values())

    def _pairs(self, block: Block) -> Iterator[tuple[Solver, Case]]:
        return ((s, c) for c in block.cases for s in self.solvers if self.problem.solves(s, c))

    def _order(self, block: Block, number: int) -> list[tuple[Solver, Case]]:
        """Case by case, so that what is compared is measured within seconds; who follows whom changes by round."""
        pairs, turn = list(self._pairs(block)), random.Random(number)
        turn.shuffle(pairs)
        return sorted(pairs, key=lambda pair: block.cases.index(pair[1]))

    def _blank(self, solver: Solver, case: Case, threads: int) -> Outcome:
        return Outcome(solver.name, case.id, threads, why_not=solver.why_not())

    def _peers(self, block: Block, outcomes: dict[tuple[str, str], Outcome]) -> dict[str, Peer]:
        peers = {}
        for solver in self.solvers:
            own = [o for o in outcomes.values() if o.solver == solver.name and o.why_not is None]
            if not own:
                continue
            try:
                python = python_of(solver.environment)
            except EnvironmentFailed as error:
                for outcome in own:
                    outcome.why_not = str(error)
                continue
            peers[solver.name] = Peer(
                python, self.problem.package, solver.name, block.threads, patience=self.effort.patience
            )
        return peers

    def _visit(self, solver: Solver, case: Case, number: int, outcome: Outcome, peer: Peer | None) -> None:
        if outcome.why_not is None and peer is not None:
            try:
                self._ask(case, number, outcome, peer, self.truths.files(case, exported=solver.reads_files))
            except ExportFailed as error:
                outcome.why_not = str(error)
        self.tick(f"{outcome.threads} threads: {case.id}: {solver.name}")

    def _ask(self, case: Case, number: int, outcome: Outcome, peer: Peer, files: Path) -> None:
        written = files / f"{outcome.solver}.npz"
        request = {"case": case.id, "seconds": self.effort.seconds, "files": str(files)}
        checked = number in (0, self.effort.rounds - 1)
        outcome.take(peer.ask(request | ({"output": str(written)} if checked else {})))
        self._judge(case, outcome, written)

    def _judge(self, case: Case, outcome: Outcome, written: Path) -> None:
        if written.exists():
            outcome.judge(self.truths.error(case, written), self.problem.tolerance(outcome.solver))
            written.unlink()
