"""P148, Shivdikar, SMASH: Sparse Matrix Atomic Scratchpad Hashing, 2021.

The paper's processor merges terms by atomic additions into a scratchpad that all threads share. Here rows belong to
threads and caches are the scratchpad; what is tested is the idea that both rest on: terms that are merged as they arise
need no matrix of partial products, which the baseline "sort" lists, sorts and then merges row by row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from benchmarks.spgemm.matrices import PRODUCTS
from claims.outcome import Outcome
from gossamer import spgemm

CLAIM = "A row-wise sparse x sparse product that merges terms as they arise beats listing partial products first."
PAPER = "9.4x faster than competing approaches, on the experimental PIUMA processor (abstract)"
RULE = "on every real matrix at least 1.5 times as fast as listing and sorting, and as scipy"


def _seconds(run: Callable[[], object], times: int) -> float:
    """Median of so many calls, after one to warm up."""
    run()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def run(full: bool = False) -> Outcome:
    ours, ratios, times = {}, [], 9 if full else 3
    for name, (data, factors) in PRODUCTS.items():
        if data != "real":
            continue
        a, b = factors()
        merged = _seconds(lambda a=a, b=b: spgemm(a, b), times)
        listed = _seconds(lambda a=a, b=b: spgemm(a, b, accumulators="sort"), times)
        scipys = _seconds(lambda a=a, b=b: a @ b, times)
        ratios += [listed / merged, scipys / merged]
        ours[f"{name}: over listing and sorting"] = f"{listed / merged:.2f}"
        ours[f"{name}: over scipy"] = f"{scipys / merged:.2f}"
    return Outcome(ours, min(ratios) >= 1.5, RULE)
