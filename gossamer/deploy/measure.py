"""Measure one layer: every candidate on its real shape, checked before it is timed.

Shapes: T tokens, M output rows, K input columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.errors import DispatchError, FormatError
from ..kernels.dispatch import Plan, resolve
from ..kernels.reference import activate
from .candidates import DENSE, MOST_DECODE_TOKENS, TORCH_DENSE, Candidate
from .examples import close, difference
from .record import Trial
from .timing import Timing, in_turn, quiet

# Rows of the small product that warms a kernel's code; a multiple of every group and block.
TWIN_ROWS = 16


@dataclass(frozen=True)
class Ready:
    """A candidate prepared for one layer: what runs it, and its bytes in memory."""

    run: Callable[[Tensor], Tensor]
    nbytes: int


class Work(Protocol):
    """What a layer computes, and what it is called with: linear layers in `Product`, convolutions in `Convolved`."""

    activation: str
    tokens: tuple[int, ...]

    @property
    def dense(self) -> tuple[Candidate, ...]:
        """The dense ways that every sparse one is set against."""

    @property
    def oracle(self) -> str:
        """What results are compared with, in words."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def calls(self) -> list[tuple[Tensor, int]]:
        """Each distinct input, and how often it comes."""

    def want(self, x: Tensor) -> Tensor:
        """The result, by torch."""

    def ready(self, candidate: Candidate) -> Ready:
        """Prepare a candidate. Raises DispatchError or FormatError with the reason where it cannot run the layer."""

    def few(self, x: Tensor) -> Work | None:
        """The same by a few rows only, where the weights come from memory at each call; else None."""


@dataclass(frozen=True)
class Product:
    """What a layer computes, act(x Wᵀ + b), and how often.

    Args:
        w_MK: the weight, outputs first.
        bias_M: or None.
        activation: applied to the result.
        tokens: rows of x, one entry per call.
    """

    w_MK: Tensor
    bias_M: Tensor | None
    activation: str
    tokens: tuple[int, ...]
    dense: ClassVar[tuple[Candidate, ...]] = DENSE
    oracle: ClassVar[str] = "F.linear"

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.w_MK.device

    @property
    def planned_tokens(self) -> int | None:
        """What a plan may rely on: the number of rows where all calls agree, else None."""
        return self.tokens[0] if len(set(self.tokens)) == 1 else None

    def calls(self) -> list[tuple[Tensor, int]]:
        """Each distinct input, and how often it comes."""
        return [(self._input(t), self.tokens.count(t)) for t in sorted(set(self.tokens))]

    def _input(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(tokens)
        w_MK = self.w_MK
        return torch.randn(tokens, w_MK.shape[1], generator=generator).to(w_MK.dtype).to(w_MK.device)

    def want(self, x_TK: Tensor) -> Tensor:
        """The result, by torch."""
        return activate(linear(x_TK, self.w_MK, self.bias_M), self.activation)

    def ready(self, candidate: Candidate) -> Ready:
        """Prepare a candidate."""
        plan = resolve(candidate.build(self.w_MK), tokens=self.planned_tokens, backend=candidate.backend)
        return Ready(lambda x_TK: plan.run(x_TK, self.bias_M, self.activation), memory_of(plan))

    def few(self, x_TK: Tensor) -> Product | None:
        """The same product by a few rows only, for decoding."""
        if x_TK.shape[0] > MOST_DECODE_TOKENS:
            return None
        return Product(self.w_MK[:TWIN_ROWS], None, self.activation, self.tokens)


@dataclass(frozen=True)
class Measured:
    """Trials of one layer, and the spread of each time in milliseconds."""

    trials: tuple[Trial, ...]
    noise: dict[str, float]


@torch.no_grad()
def measure(work: Work, candidates: Sequence[Candidate], repeats: int, *, cold: bool = False) -> Measured:
    """Refuse, check, then time: a candidate whose result is off torch's is refused and never timed."""
    calls = work.calls()
    wanted = [work.want(x) for x, _ in calls]
    ready: dict[Candidate, Ready] = {}
    refused: dict[Candidate, str] = {}
    for candidate in dict.fromkeys(candidates):
        try:
            able = work.ready(candidate)
        except (DispatchError, FormatError) as error:
            refused[candidate] = reasons_in(error)
            continue
        got = [able.run(x) for x, _ in calls]
        if close(got, wanted):
            ready[candidate] = able
        else:
            off = difference(got, wanted)
            refused[candidate] = f"its result is off {work.oracle}'s by {off:.2g} of the largest value"
    timings = _time(ready, work, calls, repeats, cold)
    trials = [Trial(str(c), timings[c].ms, able.nbytes) for c, able in ready.items()]
    trials += [Trial(str(c), None, None, reason) for c, reason in refused.items()]
    return Measured(tuple(trials), {str(c): t.spread for c, t in timings.items()})


def memory_of(plan: Plan) -> int:
    """Bytes of the stored weight and of what its kernel laid out beside it."""
    return plan.call.fmt.nbytes + plan.extra_nbytes


def _time(
    ready: dict[Candidate, Ready], work: Work, calls: Sequence[tuple[Tensor, int]], repeats: int, cold: bool
) -> dict[Candidate, Timing]:
    """Times of all calls together: each distinct input is timed once and counted as often as it comes."""
    total = dict.fromkeys(ready, Timing(0.0, 0.0))
    for x, often in calls:
        ways = {str(c): partial(able.run, x) for c, able in ready.items()}
        few = work.few(x) if cold else None
        twins = None if few is None else {str(c): partial(few.ready(c).run, x) for c in ready}
        taken = in_turn(ways, repeats, cold=twins)
        for c in ready:
            one = quiet(taken[str(c)])
            total[c] = Timing(total[c].ms + often * one.ms, total[c].spread + often * one.spread)
    return total


def reasons_in(error: Exception) -> str:
    """The reasons out of dispatch's message: its lines are "  backend/name: reason"."""
    lines = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    own = [line.split(": ", 1)[-1] for line in lines if ": serves " not in line]
    return "; ".join(own) or str(error).splitlines()[0]


@dataclass(frozen=True)
class Choice:
    """The candidate that won on one layer, with the two dense times to set it against."""

    winner: Trial
    dense_ms: float
    best_dense_ms: float
    reason: str


def choose(measured: Measured, allowed: Sequence[Candidate], min_gain: float, words: str, zeros: float) -> Choice:
    """The fastest; within noise, the smallest; sparse only where it gains at least `min_gain` over the best dense.

    Raises:
        DispatchError: every allowed candidate was refused; the reasons are listed.
    """
    names = {str(c) for c in allowed}
    by_name = {t.candidate: t for t in measured.trials if t.ms is not None}
    able = [t for t in by_name.values() if t.candidate in names]
    if not able:
        reasons = "\n".join(f"  {t.candidate}: {t.refused}" for t in measured.trials if t.candidate in names)
        raise DispatchError(f"none of the named candidates can run this layer:\n{reasons}")
    dense = [t for t in by_name.values() if t.candidate.startswith("dense/")]
    best_dense = min(dense, key=lambda t: t.ms)
    sparse = [t for t in able if not t.candidate.startswith("dense/") and best_dense.ms >= min_gain * t.ms]
    pool = sparse + [t for t in able if t.candidate.startswith("dense/")] or able
    winner = _fastest(pool, measured.noise)
    reason = _say(winner, best_dense, [t for t in by_name.values() if t not in dense], words, zeros, min_gain)
    return Choice(winner, by_name[str(TORCH_DENSE)].ms, best_dense.ms, reason)


def _fastest(pool: Sequence[Trial], noise: dict[str, float]) -> Trial:
    first = min(pool, key=lambda t: t.ms)
    # Clocks drift by 2 % between rounds; a spread beyond 10 % says nothing about which of two is faster.
    limit = first.ms + min(max(0.02 * first.ms, noise[first.candidate]), 0.1 * first.ms)
    return min((t for t in pool if t.ms <= limit), key=lambda t: (t.nbytes, t.ms))


def _say(winner: Trial, best_dense: Trial, sparse: Sequence[Trial], words: str, zeros: float, min_gain: float) -> str:
    against = "oneDNN" if best_dense.candidate.endswith("onednn") else "torch"
    if not winner.candidate.startswith("dense/"):
        ratio = best_dense.ms / winner.ms
        pace = f"{ratio:.1f}× faster than" if ratio >= 1.05 else f"{1 / ratio:.1f}× slower than"
        pace = "as fast as" if 0.95 <= ratio < 1.05 else pace
        return f"{words} as {winner.candidate}: {pace} dense {against}"
    if not sparse:
        return f"dense: {zeros:.0%} zeros, sparse formats were not tried"
    rival = min(sparse, key=lambda t: t.ms)
    ratio = rival.ms / winner.ms
    if ratio < 1.0:
        why = f"{1 / ratio:.2f}× faster only, under the gain of {min_gain:g} asked for"
        why = "as fast within noise, and larger" if min_gain <= 1.0 else why
        return f"dense: {rival.candidate} is {why}"
    return f"dense: {zeros:.0%} zeros are too few here, {rival.candidate} is {ratio:.1f}× slower"
