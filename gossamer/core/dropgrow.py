"""DropGrow: a support that moves while its count stays. The worst kept links go, as many others come in.

Shape suffixes: R pools, C competitors, as in `budget`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import count, top
from .errors import BudgetError, PatternError
from .pattern import Pattern, units
from .schedule import Schedule, at
from .support import Support

Worth = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
# What a way of growing goes by, beside the weight.
GROWTH = {"gradient": "gradient", "momentum": "momentum", "random": None, "unfired": "fired"}
# What training can tell of every entry of a weight, kept or not.
EVIDENCE = ("correlation", "fired", "gradient", "momentum")


@dataclass(frozen=True)
class DropGrow:
    """A policy: every `every` steps up to `until`, drop the fraction ζ of the kept links and grow as many.

    Of n kept links the round(ζ·n) with the lowest `drop` score go, over the whole layer; every pool of the pattern
    takes in as many as it lost, those with the highest `grow` score outside the links that stayed. So every pool's
    count is the same after the move as before. Step 0 is the start, where the sparsifier's own score chooses.

    Args:
        drop: worth of a kept link, (weight, statistics) → scores; the lowest go.
        grow: worth of a link outside: a score; "gradient", |∂L/∂w| of the dense weight; "momentum", |m| of the running
            mean m ← 0.9·m + 0.1·∂L/∂w; "random"; or "unfired", random among links never kept before, then the others.
        fraction: ζ, in [0, 1], or a schedule of it.
        until: last step at which the support may move. Unit: optimizer steps.
        every: steps between moves, at least 1 and at most `until`.
        regrow: links dropped in this step may come back in the same step (they then keep their values).
        across: counts may wander between layers: all layers drop and grow as one pool.
        seed: of the lots of "random" and "unfired" growth.
        needs: what scores given as functions find in their statistics beside "salt": "gradient" (∂L/∂w), "momentum"
            (m), "fired" (kept at some time), "correlation" (of the layer's inputs and outputs, in [−1, 1]).

    Raises:
        BudgetError: a field is out of range, or no move would ever be due.

    Example:
        >>> rule = DropGrow(drop=lambda w, _: w.abs(), grow="gradient", fraction=0.5, until=100, every=10)
        >>> w, g = torch.tensor([[3.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0, 2.0]])
        >>> rule.move(Support(w != 0), w.abs(), g, Pattern("[...]"), 10).kept.tolist()
        [[True, False, False, True]]
    """

    drop: Worth
    grow: Worth | str
    fraction: float | Schedule
    until: int
    every: int = 100
    regrow: bool = True
    across: bool = False
    seed: int = 0
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.grow, str) and self.grow not in GROWTH:
            raise BudgetError(f"grow= is a score or one of {', '.join(map(repr, GROWTH))}, got {self.grow!r}")
        if unheard := [need for need in self.needs if need not in EVIDENCE]:
            raise BudgetError(f"needs= names {unheard[0]!r}; training can tell {', '.join(EVIDENCE)}")
        if not callable(self.fraction) and not 0.0 <= self.fraction <= 1.0:
            raise BudgetError(f"the fraction that moves lies between 0 and 1, got {self.fraction}; try 0.3")
        if not 1 <= self.every <= self.until:
            raise BudgetError(
                f"a support that moves every {self.every} steps until step {self.until} would never move; "
                f"take every= between 1 and {self.until}, or train longer"
            )

    @property
    def evidence(self) -> frozenset[str]:
        """What training must tell of a weight before a move."""
        grown_by = GROWTH[self.grow] if isinstance(self.grow, str) else None
        return frozenset(self.needs) | ({grown_by} if grown_by else set())

    def due(self, step: int) -> bool:
        return step == 0 or (0 < step <= self.until and step % self.every == 0)

    def move(self, support: Support, drop: Tensor, grow: Tensor, pattern: Pattern, step: int) -> Support:
        """The next support of one layer.

        Args:
            support: the one it has.
            drop, grow: scores of every entry, of the weight's shape; higher = stays, or comes in. All finite.
            pattern: its pools keep their counts, its tied entries one fate.
            step: where the fraction's schedule stands. Unit: optimizer steps.
        """
        kept_RC = pattern.split(support.kept)[..., 0]
        new_RC = self._swap(kept_RC, units(drop, pattern), units(grow, pattern), step)
        return Support(pattern.merge(new_RC, support.shape))

    def move_across(
        self,
        supports: Mapping[str, Support],
        drop: Mapping[str, Tensor],
        grow: Mapping[str, Tensor],
        pattern: Pattern,
        step: int,
    ) -> dict[str, Support]:
        """The next supports of several layers that drop and grow as one pool; units of unequal size by their mean.

        Raises:
            PatternError: the pattern has several pools, whose counts could not be kept.
        """
        sizes = {n: pattern.pools(s.shape) for n, s in supports.items()}
        if any(r != 1 for r, _, _ in sizes.values()):
            raise PatternError(f"pattern {str(pattern)!r} has several pools per layer, so counts cannot wander")
        kept_1C = torch.cat([pattern.split(s.kept)[..., 0] for s in supports.values()], 1)
        drop_1C = torch.cat([units(drop[n], pattern) / sizes[n][2] for n in supports], 1)
        grow_1C = torch.cat([units(grow[n], pattern) / sizes[n][2] for n in supports], 1)
        new_1C = self._swap(kept_1C, drop_1C, grow_1C, step)
        parts = new_1C.split([c for _, c, _ in sizes.values()], 1)
        return {n: Support(pattern.merge(part, supports[n].shape)) for n, part in zip(supports, parts)}

    def _swap(self, kept_RC: Tensor, drop_RC: Tensor, grow_RC: Tensor, step: int) -> Tensor:
        weak_RC = torch.where(kept_RC, -drop_RC, -math.inf)
        lost_R = self._losses(kept_RC, weak_RC, step)
        stays_RC = kept_RC & ~_top_each(weak_RC, lost_R)
        closed_RC = stays_RC if self.regrow else kept_RC
        return stays_RC | _top_each(torch.where(closed_RC, -math.inf, grow_RC), lost_R)

    def _losses(self, kept_RC: Tensor, weak_RC: Tensor, step: int) -> Tensor:
        """How many links each pool drops: its share of the layer's weakest, and no more than could come in."""
        number = count(at(self.fraction, step), int(kept_RC.sum()))
        lost_R = top(weak_RC.reshape(1, -1), number).view_as(kept_RC).sum(1)
        return lost_R if self.regrow else lost_R.minimum((~kept_RC).sum(1))


def _top_each(s_RC: Tensor, k_R: Tensor) -> Tensor:
    """The k_R highest of each row, ties to the lower index. One pool is partitioned; many are ranked, each short."""
    if len(k_R) == 1:
        return top(s_RC, int(k_R))
    rank_RC = s_RC.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank_RC < k_R[:, None]) & (s_RC != -math.inf)


def one_of(grow: str, ways: tuple[str, ...], hint: str) -> str:
    """`grow`, if it is one of a method's ways.

    Raises:
        BudgetError: it is not.
    """
    if grow not in ways:
        raise BudgetError(f"grow= is {' or '.join(map(repr, ways))}, got {grow!r}; {hint}")
    return grow
