"""What a claim's run returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The end of one claim.

    Args:
        ours: what was measured, by name.
        verdict: whether the rule holds.
        rule: the rule, in words, written before the first run.
    """

    ours: Mapping[str, object]
    verdict: bool
    rule: str
