"""Timing: several ways to do one thing, taken in turn so that a noisy machine is unfair to none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# A round shorter than this is lost in the clock and the call, so short products are repeated within it.
SHORTEST_ROUND_MS = 0.3
# When other programs disturb the machine, up to this many times the rounds are run, for this long at most.
PATIENCE, PATIENCE_SECONDS = 5, 4.0
NOISY = 0.3


@dataclass(frozen=True)
class Timing:
    """A time and how sure it is.

    Args:
        ms: in milliseconds.
        spread: how far repeated measurements lie apart, in milliseconds.
    """

    ms: float
    spread: float


def in_turn(
    ways: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    cold: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of repeated runs, each way taking its turn in every round.

    Args:
        ways: what to run, by name.
        repeats: rounds, at least 1; up to five times as many, within four seconds, while the quartiles of any way
            lie more than 30 % of its median apart.
        cold: throw the caches' content out before each run, then run this small twin of it, so that the code is
            warm but the weights come from memory: as in decoding, where the rest of the model passes through
            the caches between two uses of a layer.
    """
    inner = {name: 1 if cold else _inner(way) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    until = time.perf_counter() + PATIENCE_SECONDS
    for done in range(max(repeats, 1) * PATIENCE):
        if done >= repeats and (time.perf_counter() > until or not _noisy(taken)):
            break
        for name, way in ways.items():
            if cold:
                _evict()
                cold[name]()
            taken[name].append(_run(way, inner[name]))
    return taken


def median(times: Sequence[float]) -> Timing:
    """The middle time, with the distance between the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return Timing(middle, high - low)


def quiet(times: Sequence[float]) -> Timing:
    """The time at the fastest twentieth, with its distance from the fastest fifth.

    Other programs only ever add time, and on two busy cores the median times the scheduler instead of the product:
    it may be a hundred times too long, while the fastest runs stay true.
    """
    ordered = sorted(times)
    fastest, fifth = ordered[len(ordered) // 20], ordered[len(ordered) // 5]
    return Timing(fastest, fifth - fastest)


def _noisy(taken: Mapping[str, list[float]]) -> bool:
    return any(t.spread > NOISY * t.ms for t in map(median, taken.values()))


def _run(way: Callable[[], object], inner: int) -> float:
    began = time.perf_counter()
    for _ in range(inner):
        way()
    return (time.perf_counter() - began) / inner * 1e3


def _inner(way: Callable[[], object]) -> int:
    way()
    return max(1, min(64, int(SHORTEST_ROUND_MS / max(_run(way, 1), 1e-4))))


def last_level_cache() -> int:
    """Bytes of the largest cache, 32 MiB where the system does not say."""
    sizes = [f.read_text().strip() for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units and s[:-1].isdigit()]
    return max(known, default=32 << 20)


_sweeper: list[Tensor] = []


def _evict() -> None:
    """Write over twice the cache."""
    if not _sweeper:
        _sweeper.append(torch.zeros(2 * last_level_cache() // 4, dtype=torch.float32))
    _sweeper[0].add_(1.0)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Run with that many threads, torch's and ours; None leaves the setting alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
