"""How every time is taken, in one place. All problems, all engines, the same rules.

- Each engine has its own process, its own environment where pins clash, its own thread pool, and its own defaults.
- One engine works at a time; between its turns it sleeps in `read`.
- Rounds visit all engines in turn, in an order that changes from round to round: a slow minute hits all alike.
- A figure is the median of the rounds' medians; its noise is their interquartile range over it.
- Every output is compared with a float64 truth, first and last, by the parent, not by the engine's process.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

# Waiting OpenMP threads: spinning for tens of microseconds costs nobody anything, since one engine works at a time; not
# spinning at all would cost small products more than they take; spinning for long starves the other core of small
# machines once the next engine's turn comes.
WAITING = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
# No engine reports home from a benchmark.
SILENCE = {"NM_DISABLE_ANALYTICS": "True", "DO_NOT_TRACK": "1", "OPENVINO_TELEMETRY": "0"}
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Effort:
    """How long is measured: `rounds` visits of `seconds` each; a reply may take `patience` seconds."""

    rounds: int = 7
    seconds: float = 0.15
    patience: float = 300.0

    def record(self) -> dict[str, float]:
        """For the results' JSON."""
        return asdict(self)


QUICK = Effort(rounds=2, seconds=0.02)


def worker_environment(threads: int, root: str) -> dict[str, str]:
    """What a worker's process is started with: every pool has `threads` threads."""
    return {**os.environ, **WAITING, **SILENCE, **dict.fromkeys(POOLS, str(threads)), "PYTHONPATH": root}
