"""Timing: several ways to do one thing, taken in turn so that a noisy machine is unfair to none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# A round shorter than this is lost in the clock and the call, so short products are repeated within it.
SHORTEST_ROUND_MS = 0.3
# When other programs disturb the machine, up to this many times the rounds are run before the median is believed.
PATIENCE = 4
NOISY = 0.3


@dataclass(frozen=True)
class Timing:
    """Median and spread of repeated runs.

    Args:
        ms: median, in milliseconds.
        iqr: distance between the quartiles, in milliseconds.
    """

    ms: float
    iqr: float


def in_turn(ways: Mapping[str, Callable[[], object]], repeats: int, *, cold: bool = False) -> dict[str, Timing]:
    """Time each way `repeats` times, one after the other in every round.

    Args:
        ways: what to run, by name.
        repeats: rounds, at least 1; up to four times as many while the quartiles lie 30 % of the median apart.
        cold: throw the caches' content out before each run: weights come from memory, as in decoding, where the
            rest of the model passes through the cache between two uses of a layer.
    """
    inner = {name: 1 if cold else _inner(way) for name, way in ways.items()}
    sweep = _evict if cold else _nothing
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(max(repeats, 1) * PATIENCE):
        if done >= repeats and not _noisy(taken):
            break
        for name, way in ways.items():
            sweep()
            taken[name].append(_run(way, inner[name]))
    return {name: summary(times) for name, times in taken.items()}


def _noisy(taken: Mapping[str, list[float]]) -> bool:
    return any(t.iqr > NOISY * t.ms for t in map(summary, taken.values()))


def summary(times: list[float]) -> Timing:
    """Median and interquartile range of times in milliseconds."""
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return Timing(statistics.median(times), quartiles[2] - quartiles[0])


def _run(way: Callable[[], object], inner: int) -> float:
    began = time.perf_counter()
    for _ in range(inner):
        way()
    return (time.perf_counter() - began) / inner * 1e3


def _inner(way: Callable[[], object]) -> int:
    way()
    return max(1, min(64, int(SHORTEST_ROUND_MS / max(_run(way, 1), 1e-4))))


def _nothing() -> None:
    return None


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
        _sweeper.append(torch.zeros(2 * last_level_cache() // 4))
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
