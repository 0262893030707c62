"""What one solver gave on one case: its rounds, its noise, its error, or the reason why there is no figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields


@dataclass
class Outcome:
    """One solver on one case at one thread count. Times in milliseconds."""

    solver: str
    case: str
    threads: int
    rounds_ms: list[float] = field(default_factory=list)
    error: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    resident_mb: float = 0.0
    why_not: str | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """Solver, case, threads."""
        return self.solver, self.case, self.threads

    @property
    def median_ms(self) -> float:
        """The median of the rounds' medians."""
        return statistics.median(self.rounds_ms)

    @property
    def noise(self) -> float:
        """Interquartile range of the rounds over their median; 0 for a single round."""
        if len(self.rounds_ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.rounds_ms, n=4)
        return (high - low) / self.median_ms

    @property
    def usable(self) -> bool:
        """Timed, and its numbers were right."""
        return self.why_not is None and bool(self.rounds_ms)

    def take(self, reply: Mapping) -> None:
        """Add one round, or the reason why there is none."""
        if "median_ms" not in reply:
            self.why_not = reply["failed"]
            return
        self.rounds_ms.append(reply["median_ms"])
        self.measures.update(reply.get("measures", {}))
        self.resident_mb = max(self.resident_mb, reply.get("resident_mb", 0.0))

    def judge(self, error: float, tolerance: float) -> None:
        """Keep the larger error; refuse the solver where it is more than rounding. NaN is an error too."""
        self.error = error if self.error is None or not error <= self.error else self.error
        if not self.error <= tolerance:
            self.why_not = f"wrong numbers: relative error {self.error:.1e}, allowed {tolerance:.0e}"

    def record(self) -> dict:
        """Everything that was measured, for JSON."""
        return asdict(self) | ({"median_ms": self.median_ms, "noise": self.noise} if self.rounds_ms else {})

    @classmethod
    def read(cls, record: Mapping) -> Outcome:
        """The inverse of `record`."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in record.items() if k in known})


def geometric_mean(ratios: Sequence[float]) -> float:
    """exp(mean(log r)): the mean of speed-ups."""
    return statistics.geometric_mean(ratios)
