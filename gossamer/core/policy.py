"""Policies: when a support may change. (Where it changes to is the sparsifier's business.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .errors import BudgetError


class Policy(Protocol):
    """Says at which optimizer steps a new support is chosen."""

    def due(self, step: int) -> bool:
        """True if the support is chosen anew after this step."""
        ...


@dataclass(frozen=True)
class OneShot:
    """Choose once, at `step`, then never again."""

    step: int = 0

    def due(self, step: int) -> bool:
        return step == self.step


@dataclass(frozen=True)
class Ramp:
    """Choose anew every `every` steps from `begin` to `end`, both included; fixed afterwards.

    Args:
        begin, end: first and last step of the ramp. Unit: optimizer steps.
        every: steps between changes, at least 1.
    """

    begin: int
    end: int
    every: int = 100

    def __post_init__(self) -> None:
        if self.every < 1 or self.end < self.begin:
            raise BudgetError(f"a ramp needs every >= 1 and end >= begin, got {self}")

    def due(self, step: int) -> bool:
        inside = self.begin <= step <= self.end
        return inside and ((step - self.begin) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class Always:
    """Choose anew every `every` steps, for ever: supports that follow weights which never stop learning.

    Args:
        every: steps between choices, at least 1.
        at: steps at which the support is chosen whatever `every` says, such as those where the budget changes.
    """

    every: int = 1
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 1:
            raise BudgetError(f"a support is chosen every 1, 2, ... steps, got every={self.every}")

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step in self.at


def within_run(until: int, total_steps: int) -> int:
    """`until`, if the run is that long.

    Raises:
        BudgetError: the run ends before.
    """
    if until > total_steps:
        raise BudgetError(
            f"the schedule goes on to step {until}, but the run ends at {total_steps}; shorten until=, or train longer"
        )
    return until
