"""Stages of a demo, shown as they begin; what is inside one shows its own progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]


class Stages:
    """Counts stages; used as `with stages("packing"):`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self.name = ""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.name = name
        self._show(name)
        yield
        self.done += 1
        self._show(name)

    def inner(self, _: str, done: int, total: int) -> None:
        """Progress within the current stage."""
        self._show(f"{self.name} {100 * done // max(total, 1)} %")

    def _show(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text, self.done, self.total)
