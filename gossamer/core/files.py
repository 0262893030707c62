"""Write files so that a reader sees all of the new content or none of it, whatever kills the writer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed over it when the block ends well, removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        _flush(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`; takes its place when the block ends well, removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                _flush(file)
        _swap(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, path: Path) -> None:
    old = draft.with_name(draft.name + ".old")
    if path.exists():
        os.replace(path, old)
    os.chmod(draft, 0o755)  # mkdtemp makes it private; a saved model is for whoever may read its parent
    os.replace(draft, path)
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
    if file.stat().st_mode & 0o077 == 0:  # mkstemp makes it private
        os.chmod(file, 0o644)
