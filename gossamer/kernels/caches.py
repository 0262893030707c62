"""Caches: where compiled kernels and measured times lie, how much that is, and how to be rid of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from gossamer.core.errors import unknown
from gossamer.core.files import cache_root
from gossamer.kernels.tuning import tuning_root


@dataclass(frozen=True)
class Cache:
    """One cache on disk.

    Args:
        name: "kernels" or "tunings".
        folder: where it lies; it may not exist yet.
        ending: how the files end that count as entries.
    """

    name: str
    folder: Path
    ending: str

    @property
    def files(self) -> list[Path]:
        """Everything in it; other processes may add and remove files meanwhile."""
        return [Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names]

    @property
    def entries(self) -> int:
        """Compiled kernels with the functions they call, or measurements; of all processors and versions."""
        return sum(file.name.endswith(self.ending) for file in self.files)

    @property
    def nbytes(self) -> int:
        return sum(_size(file) for file in self.files)

    def clear(self) -> int:
        """Delete everything; bytes freed. Processes that run keep what they have loaded."""
        before = self.nbytes
        shutil.rmtree(self.folder, ignore_errors=True)
        return before - self.nbytes


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def caches() -> tuple[Cache, ...]:
    """Both caches.

    Example:
        >>> [cache.name for cache in caches()]
        ['kernels', 'tunings']
    """
    # Numba writes an index (.nbi) and one file of machine code (.nbc) per function.
    return Cache("kernels", cache_root() / "kernels", ".nbc"), Cache("tunings", tuning_root(), ".json")


def cache_named(name: str) -> Cache:
    """One of them.

    Raises:
        UnknownName: no such cache; near names are listed.
    """
    known = {cache.name: cache for cache in caches()}
    if name not in known:
        raise unknown("cache", name, known)
    return known[name]
