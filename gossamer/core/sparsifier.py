"""Sparsifier: score, pattern, budget and shrink rule in one frozen record. A method is a function that returns one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .budget import Budget, Density, Keep, count, resolve
from .errors import BudgetError, NonFiniteError, PatternError
from .explore import Explore
from .pattern import Pattern
from .policy import OneShot, Policy
from .regroup import regroup, select_regrouped
from .schedule import Schedule, Span, at
from .search import Search
from .select import select, select_across
from .shrink import Attenuate, Shrink, StraightThrough, hard
from .support import Support

Stats = Mapping[str, Tensor]
Score = Callable[[Tensor, Stats], Tensor]
ONE_SHOT = OneShot()
Solver = Callable[[Tensor, Stats, Pattern, Budget], tuple[Tensor, Support]]
# (model, weights by parameter name, data and loss) → statistics of each of those weights, of its shape.
Probe = Callable[..., Mapping[str, Stats]]


@dataclass(frozen=True)
class Sparsifier:
    """How one weight becomes sparse.

    Args:
        score: (weight, stats) → worth of each entry, higher = kept.
        pattern: who competes with whom.
        budget: how many win in each pool.
        shrink: what becomes of the values.
        policy: when the support is chosen.
        needs: statistics to collect first: "input_norm", "input_mean", "input_var", "gram" of the layer's input, or
            what `probe` finds.
        sequential: statistics are taken with all layers before this one pruned, "layer"; or with those of its own block
            still dense, "block".
        scope: "layer" = each weight by itself; "model" = all weights are one pool.
        solve: an alternating solver that replaces score, select and shrink (SparseGPT), or None.
        name: the method's name, for reports.
        regroup: let the pattern choose which rows it ties together, see `gossamer.core.regroup`.
        backward: while training, the gradient by a layer's inputs sees another selection of the same scores and budget,
            made by this pattern; None = the forward one.
        allocation: how `attach` spreads the density over layers unless told otherwise: "uniform", "er", "erk", or a
            method in which layers compete.
        probe: finds statistics that need all layers at once, such as the loss's gradient, or None.
        rounds: n: the first support is chosen n times, each within the one before, at densities d^(1/n), d^(2/n) … d,
            the probe seeing what is left.
        explore: while training, the gradient reaches a wider support than the forward pass; None = the same.
        search: while training, weights are frozen and their scores learn, which move the support; None = weights learn.
    """

    score: Score
    pattern: Pattern
    budget: Budget
    shrink: Shrink = hard
    policy: Policy = ONE_SHOT
    needs: tuple[str, ...] = ()
    sequential: str = "layer"
    scope: str = "layer"
    solve: Solver | None = None
    name: str = ""
    regroup: bool = False
    allocation: str = "uniform"
    backward: Pattern | None = None
    probe: Probe | None = None
    rounds: int = 1
    explore: Explore | None = None
    search: Search | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise BudgetError(f"a support is chosen in 1, 2, ... rounds, got rounds={self.rounds}")

    def apply(self, w: Tensor, stats: Stats, *, within: Support | None = None, step: int = 0) -> tuple[Tensor, Support]:
        """One weight → its new values and its support.

        Raises:
            NonFiniteError: the weight holds NaN or infinity; repair or reload it.
            PatternError: `within` was given to a solver, which chooses its own support.
        """
        require_finite(w, "the weight")
        if self.solve is not None:
            if within is not None:
                raise PatternError(
                    f"{self.name or 'this solver'} cannot choose within a given support; leave within= out"
                )
            return self._solved(w, stats, step)
        support = self.choose(self.score(w, stats), within=within, step=step)
        shrink = self.shrink.at(step) if isinstance(self.shrink, StraightThrough | Attenuate) else self.shrink
        return shrink(w, support), support

    def choose(self, scores: Tensor, *, within: Support | None = None, step: int = 0) -> Support:
        """The support that scores win, by this sparsifier's pattern and budget."""
        chosen = select_regrouped if self.regroup else select
        return chosen(scores, self.pattern, self.budget, within=within, step=step)

    def choose_across(
        self, scores: Mapping[str, Tensor], *, within: Mapping[str, Support] | None = None, step: int = 0
    ) -> dict[str, Support]:
        """The same with one pool over several tensors.

        Raises:
            PatternError: `within` and regroup, which chooses its own rows.
        """
        if not self.regroup:
            return select_across(scores, self.pattern, self.budget, within=within, step=step)
        if within is not None:
            raise PatternError("regroup chooses which rows share a support; it cannot do so within a given support")
        orders = {n: regroup(s, self.pattern, resolve(self.budget, step)) for n, s in scores.items()}
        won = select_across({n: s[orders[n]] for n, s in scores.items()}, self.pattern, self.budget, step=step)
        return {n: Support(s.kept[orders[n].argsort()]) for n, s in won.items()}

    def _solved(self, w: Tensor, stats: Stats, step: int) -> tuple[Tensor, Support]:
        """Rows are solved one by one or by groups, so their order is the pattern's business alone."""
        assert self.solve is not None
        budget = resolve(self.budget, step)
        if not self.regroup:
            return self.solve(w, stats, self.pattern, budget)
        order = regroup(self.score(w, stats), self.pattern, budget)
        new, support = self.solve(w[order], stats, self.pattern, budget)
        back = order.argsort()
        return new[back], Support(support.kept[back])

    def at_density(self, density: float) -> Sparsifier:
        """The same sparsifier with another density, at the end of its schedule if it has one (for allocations).

        Raises:
            BudgetError: the pattern fixes its own density, as 2:4 does.
        """
        ramp = self.budget.d if isinstance(self.budget, Density) else None
        target = replace(ramp, end=density) if isinstance(ramp, Span) else density
        return replace(self, budget=budget_for(self.pattern, target))

    def final_density(self) -> float:
        """The fraction kept once every schedule has run its course.

        Raises:
            BudgetError: the budget is not a density.
        """
        if not isinstance(self.budget, Density):
            raise BudgetError(f"pattern {str(self.pattern)!r} keeps by {self.budget}, which names no density")
        d = self.budget.d
        return d.end if isinstance(d, Span) else at(d, 0)


def require_finite(w: Tensor, what: str) -> None:
    """Raise NonFiniteError, naming `what` and how many entries are bad, unless all of `w` is finite."""
    if bool(w.sum().isfinite()):  # an infinity or NaN never sums up to a number, and adding is ten times cheaper
        return
    bad = w.numel() - int(w.isfinite().sum())
    if bad:
        raise NonFiniteError(
            f"{what} has {bad} NaN or infinite entries of {w.numel()} (shape {tuple(w.shape)}); repair or reload it"
        )


def budget_for(pattern: Pattern, density: float | Schedule | None, *, default: float | None = None) -> Budget:
    """`Keep(N)` where the pattern's name fixes N, else `Density(density)`, or `Density(default)` if none was given.

    Raises:
        BudgetError: no density given and the pattern fixes none, or both are given and disagree.
    """
    if pattern.kept is None:
        density = default if density is None else density
        if density is None:
            raise BudgetError(f"pattern {str(pattern)!r} does not fix a density; pass density= (the fraction kept)")
        return Density(density)
    size = pattern.pool_size
    if isinstance(density, (int, float)) and size is not None and count(density, size) != pattern.kept:
        raise BudgetError(
            f"pattern {pattern.expr!r} keeps {pattern.kept} of {size} = density {pattern.kept / size:g}, "
            f"but density {density:g} was asked for; leave one of the two out"
        )
    return Keep(pattern.kept)
