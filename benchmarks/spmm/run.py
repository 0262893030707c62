"""All solvers on all stacks in one interleaved run, at one and two threads.

    python -m benchmarks.spmm.run [--quick] [--threads 1 2] [--rounds 7]

Every solver has a process per thread count; rounds visit all of them in turn, so a slow minute of the machine hits
all alike. A case's figure is the median of its rounds' medians, its noise their interquartile range. A speed-up is
given only when both sides computed the right numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.results import table, write_results
from benchmarks.spmm import solvers
from benchmarks.spmm.stacks import NAMES, ZEROS

# Dense engines multiply zeros too, so their time is taken once per stack, over weights with this share of them.
DENSE_ZEROS = 0.9
# One engine works at a time, so a short spin between its own calls disturbs nobody; none would cost small products
# more than they take.
WAITING = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


@dataclass
class Case:
    """One solver on one stack at one share of zeros and one thread count, and what its rounds gave."""

    solver: str
    stack: str
    zeros: float
    threads: int
    rounds_ms: list[float] = field(default_factory=list)
    error: float | None = None
    kept_flops: float = 0.0
    why_not: str | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.rounds_ms)

    @property
    def noise(self) -> float:
        """Interquartile range of the rounds over their median."""
        if len(self.rounds_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds_ms, n=4)
        return (high - low) / self.median_ms

    @property
    def usable(self) -> bool:
        return self.why_not is None and bool(self.rounds_ms)

    def take(self, reply: dict) -> None:
        """Add one round, or the reason why there is none."""
        if "median_ms" not in reply:
            self.why_not = reply["failed"]
            return
        self.rounds_ms.append(reply["median_ms"])
        self.error, self.kept_flops = reply["error"], reply["kept_flops"]
        if not reply["ok"]:
            self.why_not = f"wrong numbers: relative error {reply['error']:.1e}"

    def record(self) -> dict:
        """Everything that was measured, for JSON."""
        extra = {"median_ms": self.median_ms, "noise": self.noise} if self.rounds_ms else {}
        return asdict(self) | extra


def start(solver: str, threads: int) -> subprocess.Popen:
    """A worker whose every pool has this many threads and sleeps when idle."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    command = [sys.executable, "-m", "benchmarks.spmm.worker", "--solver", solver, "--threads", str(threads)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, **WAITING, **counts, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    )


def ask(worker: subprocess.Popen, line: str) -> dict:
    """Send a case to a worker and wait for its answer."""
    try:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        reply = worker.stdout.readline()
    except BrokenPipeError:
        reply = ""
    return json.loads(reply) if reply else {"failed": f"worker died with exit code {worker.wait()}"}


def cases_for(threads: int, names: tuple[str, ...], zeros: tuple[float, ...]) -> list[Case]:
    """Every case of one thread count, in the order a round visits them."""
    return [
        Case(solver, name, z, threads)
        for name in names
        for z in zeros
        for solver in solvers.ALL
        if (solvers.load(solver).SPARSE or z == DENSE_ZEROS) and name in getattr(solvers.load(solver), "STACKS", NAMES)
    ]


def measure(cases: list[Case], threads: int, rounds: int, seconds: float) -> None:
    """Visit all cases `rounds` times, each solver in its own process."""
    workers = {solver: start(solver, threads) for solver in solvers.ALL}
    try:
        for number in range(rounds):
            for case in cases:
                if case.why_not is None:
                    case.take(ask(workers[case.solver], f"{case.stack} {case.zeros} {seconds}"))
            print(f"{threads} threads: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait(timeout=60)


def speedups(cases: list[Case]) -> list[dict]:
    """Our solvers against each sparse peer on the same zeros and against the best dense engine."""
    by_key = {(c.solver, c.stack, c.zeros, c.threads): c for c in cases}
    rows = []
    for ours in (c for c in cases if c.solver in solvers.OURS and c.rounds_ms):
        dense = [by_key.get((d, ours.stack, DENSE_ZEROS, ours.threads)) for d in solvers.DENSE_ENGINES]
        right = [d for d in dense if d is not None and d.usable]
        best = min(right, key=lambda d: d.median_ms, default=None)
        row = {"solver": ours.solver, "stack": ours.stack, "zeros": ours.zeros, "threads": ours.threads}
        row["best_dense_engine"] = best.solver if best else None
        row["over_best_dense"] = ratio(best, ours)
        for peer in solvers.SPARSE_PEERS:
            row[f"over_{peer}"] = ratio(by_key.get((peer, ours.stack, ours.zeros, ours.threads)), ours)
        row["refused"] = ours.why_not
        rows.append(row)
    return rows


def ratio(other: Case | None, ours: Case) -> float | None:
    """Other's time over ours; None when either side is missing or wrong."""
    if other is None or not other.usable or not ours.usable:
        return None
    return other.median_ms / ours.median_ms


def show(x: float | None, form: str = "{:.2f}x") -> str:
    return "-" if x is None else form.format(x)


HEADS = ["stack", "zeros", "threads", "solver", "ms", "kept GF/s", "noise", "over best dense engine"]
HEADS += [f"over {peer}" for peer in solvers.SPARSE_PEERS]


def line(case: Case, gain: dict | None) -> list[str]:
    """One row of the table: what was measured, and for our solvers the speed-ups."""
    dense = case.solver in solvers.DENSE_ENGINES
    rate = case.kept_flops / case.median_ms / 1e6 if case.rounds_ms and not dense else None
    cells = [case.stack, "dense" if dense else f"{case.zeros:.2f}", str(case.threads), case.solver]
    cells += [show(case.median_ms if case.rounds_ms else None, "{:.3f}"), show(rate, "{:.0f}")]
    cells += [show(case.noise if case.rounds_ms else None, "{:.0%}")]
    if gain is None:
        return [*cells, *[""] * (1 + len(solvers.SPARSE_PEERS))]
    over = f"{show(gain['over_best_dense'])} ({gain['best_dense_engine']})"
    return [*cells, over, *(show(gain[f"over_{peer}"]) for peer in solvers.SPARSE_PEERS)]


def report(cases: list[Case], gains: list[dict]) -> tuple[list[list[str]], list[str]]:
    """The table's rows, case by case with all solvers together, and notes on what was refused."""
    by_case = {(g["solver"], g["stack"], g["zeros"], g["threads"]): g for g in gains}
    order = sorted(cases, key=lambda c: (c.threads, NAMES.index(c.stack), c.solver in solvers.DENSE_ENGINES, c.zeros))
    shown = [c for c in order if c.rounds_ms]
    rows = [line(c, by_case.get((c.solver, c.stack, c.zeros, c.threads))) for c in shown]
    refused = {f"{c.solver} on {c.stack}: {c.why_not}" for c in cases if c.why_not}
    notes = ["noise is the interquartile range of the rounds over their median; kept GF/s counts kept weights only"]
    notes += [
        f"dense engines were timed over weights with {DENSE_ZEROS:.0%} zeros, which they multiply like any others"
    ]
    return rows, notes + sorted(refused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of few cases; writes no results")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.15, help="measuring time per case and round")
    options = parser.parse_args()
    rounds, seconds = (1, 0.02) if options.quick else (options.rounds, options.seconds)
    zeros = (DENSE_ZEROS,) if options.quick else ZEROS
    cases: list[Case] = []
    for threads in options.threads:
        some = cases_for(threads, NAMES, zeros)
        measure(some, threads, rounds, seconds)
        cases += some
    gains = speedups(cases)
    rows, notes = report(cases, gains)
    if options.quick:
        print(table(HEADS, rows), *notes, sep="\n")
    else:
        record = {"settings": vars(options) | WAITING, "cases": [c.record() for c in cases], "speedups": gains}
        print(f"wrote {write_results('spmm', record, HEADS, rows, notes)}")


if __name__ == "__main__":
    main()
