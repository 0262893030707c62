"""One solver at one thread count in a process of its own, measuring what it is told to, line by line.

    python -m benchmarks.spmm.worker --solver ours_grouped4 --threads 1
reads lines such as `mlp 0.9 0.15` (stack, zeros, seconds) and answers each with one line of JSON. Between lines it
sleeps in `read`, so that no pool of one engine disturbs another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from functools import cache

import torch

from benchmarks.spmm import solvers
from benchmarks.spmm.stacks import exact, stack

# Float32 through six to eight layers: this much of the largest output may be rounding.
TOLERANCE = 1e-4


@cache
def prepared(solver: str, threads: int, name: str, zeros: float):
    """The solver's function for one case, with its worst relative error and how many operations it should count."""
    module = solvers.load(solver)
    case = stack(name, zeros, module.TIED)
    run, truth = module.prepare(case, threads), exact(case)
    error = float((run().double() - truth).abs().max() / truth.abs().max())
    return run, error, case.kept_flops


def measure(run, seconds: float) -> dict:
    """Quartiles of single calls in milliseconds, after two to warm up."""
    run(), run()
    taken, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(taken) < 5:
        start = time.perf_counter_ns()
        run()
        taken.append((time.perf_counter_ns() - start) / 1e6)
    low, middle, high = statistics.quantiles(taken, n=4)
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "calls": len(taken)}


def answer(solver: str, threads: int, line: str) -> dict:
    """Measure the case that a line names."""
    name, zeros, seconds = line.split()
    run, error, flops = prepared(solver, threads, name, float(zeros))
    return {"error": error, "ok": error <= TOLERANCE, "kept_flops": flops, **measure(run, float(seconds))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solver", required=True, choices=solvers.ALL)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    # torch calls its CSR tensors a beta at every start.
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    torch.set_num_threads(options.threads)
    for line in sys.stdin:
        try:
            reply = answer(options.solver, options.threads, line)
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
