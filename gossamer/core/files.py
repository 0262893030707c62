"""Files: written so that a reader sees all of the new content or none of it, hashed, and kept in one cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Of linux/fcntl.h and linux/fs.h.
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def cache_root() -> Path:
    """Where assets and compiled kernels are kept: `GOSSAMER_CACHE_DIR`, else `gossamer` in the user's cache."""
    if named := os.environ.get("GOSSAMER_CACHE_DIR"):
        return Path(named).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gossamer"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gossamer"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gossamer"


def digest(path: str | Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold a lock between processes, which the system drops when the process dies; none where there are no locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w") as file:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    os.chmod(draft, 0o755)  # mkdtemp makes it private; a saved model is for whoever may read its parent
    if not path.exists():
        os.replace(draft, path)
    elif not _exchange(draft, path):
        _replace(draft, path)


def _exchange(draft: Path, path: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system cannot."""
    rename = _renameat2()
    return (
        rename is not None and rename(AT_FDCWD, os.fsencode(draft), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) == 0
    )


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    if sys.platform != "linux":
        return None
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28 and later
    if rename is not None:
        rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return rename


def _replace(draft: Path, path: Path) -> None:
    """Two renames. Between them nothing has the name; if the second fails, the old folder gets it back."""
    old = draft.with_name(draft.name + ".old")
    os.replace(path, old)
    try:
        os.replace(draft, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())
    if file.stat().st_mode & 0o077 == 0:  # mkstemp makes it private
        os.chmod(file, 0o644)
