"""Speed-up over the best dense engine against density."""

from __future__ import annotations

from pathlib import Path

from .compare import Comparison


def draw(compared: Comparison, path: Path) -> Path | None:
    """Nothing yet where a problem has no densities."""
    return None
