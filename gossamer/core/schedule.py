"""Schedules: a training step → a number. Plain frozen records, so they compare, print and pickle-free serialise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import BudgetError

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """value, for ever."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Span:
    """From `start` to `end` between steps `begin` and `begin + steps`; flat before and after.

    Args:
        start, end: the two values.
        begin: first step of the change. Unit: optimizer steps.
        steps: length of the change, at least 1. Unit: optimizer steps.
    """

    start: float
    end: float
    begin: int = 0
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BudgetError(f"a schedule needs steps >= 1, got {self.steps}; use Constant for a fixed value")

    def __call__(self, step: int) -> float:
        t = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        return self.end if t == 1.0 else self.shape(t)

    def shape(self, t: float) -> float:
        """Value at progress t in [0, 1)."""
        return self.start + (self.end - self.start) * t


class Linear(Span):
    """start + (end − start)·t."""


class Cubic(Span):
    """end + (start − end)·(1 − t)³: fast first, slow last. Zhu & Gupta, arXiv:1710.01878."""

    def shape(self, t: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - t) ** 3


class Cosine(Span):
    """end + (start − end)·(1 + cos πt)/2."""

    def shape(self, t: float) -> float:
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * t)) / 2.0


class Exponential(Span):
    """start·(end/start)^t: a constant ratio per step.

    Raises:
        BudgetError: start and end are not both positive (a ratio needs that); use Linear or Cubic.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start <= 0 or self.end <= 0:
            raise BudgetError(
                f"Exponential needs start and end > 0, got {self.start} and {self.end}; use Linear or Cubic"
            )

    def shape(self, t: float) -> float:
        return self.start * (self.end / self.start) ** t


@dataclass(frozen=True)
class Step:
    """`start` until the first boundary, then each value from its step on: Step(1.0, ((100, 0.5), (200, 0.25)))."""

    start: float
    changes: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        steps = [s for s, _ in self.changes]
        if steps != sorted(set(steps)):
            raise BudgetError(f"Step needs rising, distinct steps, got {steps}; sort them")

    def __call__(self, step: int) -> float:
        reached = [value for begin, value in self.changes if begin <= step]
        return reached[-1] if reached else self.start


@dataclass(frozen=True)
class Until:
    """`first` before step `end`, `then` from there on."""

    first: Schedule
    end: int
    then: float

    def __call__(self, step: int) -> float:
        return self.first(step) if step < self.end else self.then


def at(value: float | Schedule, step: int) -> float:
    """The number itself, or the schedule's value at `step`."""
    return value(step) if callable(value) else value
