"""Compile once per machine: where compiled kernels are kept, and a line that says so when one is built."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import pickle
import sys
import tempfile
import threading
from pathlib import Path

from gossamer.core.files import cache_root, locked
from gossamer.kernels.cpu.target import cpu_name

_log = logging.getLogger("gossamer")
_lock = threading.RLock()
# What reading a damaged pickle raises; no error of a compilation or of the disk is among them.
_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError,
)  # fmt: skip


@functools.cache
def abi_version() -> str:
    """Hash of every source file of the CPU kernels.

    Numba keys its cache by the kernel's own file only, so an edit to a file it calls would be served stale.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def kernel_dir() -> Path:
    """Directory of compiled kernels: `<cache>/kernels/<cpu>-<hash of the sources>`; a temporary one if unwritable."""
    path = cache_root() / "kernels" / f"{cpu_name()}-{abi_version()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        _log.warning("cannot write %s (%s): kernels will be compiled in every process", path, error)
        return Path(tempfile.mkdtemp(prefix="gossamer-kernels-"))


@contextlib.contextmanager
def _numba_cache_here():
    """Point Numba's cache at our directory while one of our functions is declared, and nowhere else."""
    from numba import config

    with _lock:
        before, config.CACHE_DIR = config.CACHE_DIR, str(kernel_dir())
        try:
            yield
        finally:
            config.CACHE_DIR = before


def announce(name: str) -> None:
    """Say that a kernel is being compiled, so that a slow first call explains itself: logged, or told a terminal."""
    _log.info("compiling the %s kernel (once per machine; cached in %s)", name, kernel_dir())
    if sys.stderr.isatty() and not _log.isEnabledFor(logging.INFO):
        print(f"gossamer: compiling the {name} kernel (once per machine)", file=sys.stderr, flush=True)


def compile_kernel(function, name: str):
    """Compile `void function(void* args)` to machine code, or load it from the disk cache.

    Returns the compiled callback (its `.address` is the entry point). Keep it alive as long as the address is used.
    """
    from numba import types
    from numba.core.ccallback import CFunc

    class Announced(CFunc):
        may_compile = False

        def _compile_uncached(self):
            if not self.may_compile:
                raise _NotThereError
            announce(name)
            return super()._compile_uncached()

    with _numba_cache_here():
        kernel = Announced(function, ((types.voidptr,), types.void), {}, {"error_model": "numpy"})
        kernel.enable_caching()
        if not _read(kernel):
            # Two processes that store at once may mix up whose code is whose in Numba's index.
            with locked(kernel_dir() / ".lock"):
                kernel.may_compile = True
                try:
                    kernel.compile()
                except _DAMAGED as error:
                    _forget(error)
                    kernel.compile()
    return kernel


class _NotThereError(Exception):
    """A kernel must be compiled first."""


def _read(kernel) -> bool:
    """Whether the kernel was on disk; nobody is waited for."""
    try:
        kernel.compile()
    except (_NotThereError, *_DAMAGED):
        return False
    return True


def _forget(error: Exception) -> None:
    """Empty a damaged cache, under the lock: everything is compiled again.

    Kernels of one factory share an index, and a new one numbers its files from 1 again, so that code which stayed could
    be taken for another kernel's.
    """
    _log.warning("the cached kernels in %s are damaged (%s): compiled again", kernel_dir(), type(error).__name__)
    for ending in ("nbi", "nbc"):
        for file in list(kernel_dir().rglob(f"*.{ending}")):
            file.unlink(missing_ok=True)


def helper(function):
    """Declare a function that kernels call: compiled by Numba, cached beside them.

    Kernels and helpers must see each other as module globals and take their constants as closure integers: Numba
    keys its cache by the bytes of a closure, and a compiled function in one has new bytes in every process.
    """
    from numba import njit

    with _numba_cache_here():
        return njit(error_model="numpy", cache=True, nogil=True)(function)
