"""Run one C callback on n threads, in torch's own OpenMP pool, so that nothing is ever oversubscribed.

A kernel takes an address of its arguments and hands itself tasks by atomic counters, so it does not matter who runs
it: called once it does all the work, called n times at once it shares it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _mapped_openmp() -> str | None:
    """Path of the GNU OpenMP library that torch has already loaded into this process."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        paths = [line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "libgomp" in line]
        ours = [path for path in paths if "torch" in path] or paths
        if ours:
            return ours[0]
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return str(found[0]) if found else None


@functools.cache
def _openmp_function(name: str):
    path = _mapped_openmp() if sys.platform.startswith("linux") else None
    if path is None:
        return None
    try:
        return getattr(ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW), name)
    except (OSError, AttributeError):
        return None


@functools.cache
def thread_number_at() -> int:
    """Address of the function by which a kernel learns which thread of the pool runs it; 0 where there is none."""
    function = _openmp_function("omp_get_thread_num")
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def gomp_parallel():
    """OpenMP's entry point, `GOMP_parallel(function, argument, threads, flags)`; None where torch brings another."""
    parallel = _openmp_function("GOMP_parallel")
    if parallel is None:
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.cache
def team_size_at() -> int:
    """Address of the C function that tells a thread how many share its parallel region; 0 without torch's OpenMP."""
    path = _mapped_openmp() if gomp_parallel() else None
    if path is None:
        return 0
    function = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_get_num_threads
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gossamer")


def runner_name() -> str:
    """Which pool runs kernels on more than one thread: "torch's OpenMP" or "Python threads"."""
    return "torch's OpenMP" if gomp_parallel() else "Python threads"


class Entry:
    """A compiled kernel, ready to run on any number of threads."""

    __slots__ = ("_alone", "_parallel", "address", "kernel")

    def __init__(self, kernel):
        self.kernel, self.address = kernel, kernel.address
        self._alone: Callable[[int], None] = _Entry(kernel.address)
        self._parallel = gomp_parallel()

    def run(self, args: int, threads: int) -> None:
        """Call the kernel with the address of its arguments, on `threads` threads at once."""
        if threads <= 1:
            self._alone(args)
        elif self._parallel is not None:
            self._parallel(self.address, args, threads, 0)
        else:
            helpers = [_pool(threads - 1).submit(self._alone, args) for _ in range(threads - 1)]
            self._alone(args)
            wait(helpers)
