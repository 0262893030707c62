"""Plans at rest between calls, and what they may hold together."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from .plan import Plan


class Shelf:
    """Plans by the call they serve. Where there is no more room, those of the key used longest ago go first.

    Args:
        each: plans kept of one key: so many callers at a time need no new ones.
        keys: keys kept.
        nbytes: memory of all plans together; the last one put back stays even where it is larger.
    """

    def __init__(self, *, each: int, keys: int, nbytes: int) -> None:
        self.each, self.keys, self.most = each, keys, nbytes
        self.nbytes = 0
        self._plans: dict[Hashable, list[Plan]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._plans.values()))

    def take(self, key: Hashable) -> Plan | None:
        """A plan that nobody else runs, if there is one."""
        with self._lock:
            resting = self._plans.get(key)
            if not resting:
                return None
            plan = resting.pop()
            self.nbytes -= plan.nbytes
            return plan

    def put(self, key: Hashable, plan: Plan) -> None:
        """Bring a plan to rest."""
        with self._lock:
            resting = self._plans.pop(key, [])
            self._plans[key] = resting  # now the key used last
            if len(resting) == self.each:
                return
            resting.append(plan)
            self.nbytes += plan.nbytes
            while len(self._plans) > self.keys or (self.nbytes > self.most and len(self) > 1):
                self._make_room()

    def _make_room(self) -> None:
        """Drop one plan of the key used longest ago, and the key with its last one."""
        oldest = next(iter(self._plans))
        if resting := self._plans[oldest]:
            self.nbytes -= resting.pop(0).nbytes
        if not resting:
            del self._plans[oldest]
