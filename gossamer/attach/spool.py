"""A spool: activations that wait while passes are paused lie on disk, and come back when an operation reads them.

It sees every operation of the passes (a dispatch mode), notes the memory each one makes, and keeps the most recently
used. The rest is written to one unnamed file, which the system drops with the process, and the memory is given back
behind the tensors, which stay what they are: their next reader brings it in again. So a model needs to know nothing
of it. It costs one look at the arguments of every operation, besides the reading and writing.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KEEP, LEAST = 256 * 2**20, 64 * 2**10


@dataclass(eq=False)
class _Held:
    """One piece of memory. `at`: where the file has it, −1 nowhere; `out`: the memory is given back."""

    ref: StorageWeakRef
    nbytes: int
    at: int = -1
    out: bool = False


class Spool(TorchDispatchMode):
    """Keeps at most `keep` bytes of what passes leave behind in memory.

    Args:
        folder: where its file lies; made if missing. It grows to the activations of all batches between two layers.
        keep: what may stay in memory beside the arguments of the operation at hand. Unit: bytes.
        least: smaller pieces always stay. Unit: bytes.

    Example:
        >>> gossamer.prune(model, "sparsegpt", density=0.5, data=batches, spool="scratch")  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, *, keep: int = KEEP, least: int = LEAST) -> None:
        super().__init__()
        self.keep, self.least = keep, least
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with the last reference
        self._end, self._free = 0, defaultdict[int, list[int]](list)
        self._held: OrderedDict[int, _Held] = OrderedDict()
        self._noting, self._evicting = False, True
        self._inside, self.written = 0, 0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """While a pass runs: what it makes may go to disk; what is made otherwise (statistics, weights) never does."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    @contextmanager
    def still(self) -> Iterator[None]:
        """While kernels of our own read memory by address: nothing leaves it."""
        self._evicting = False
        try:
            yield
        finally:
            self._evicting = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        busy = self._bring(_tensors((args, kwargs)), func._schema.is_mutable)
        out = func(*args, **kwargs)
        if self._noting:
            busy |= {self._note(t) for t in _tensors(out)}
        if self._evicting and self._inside > self.keep:
            self._evict(busy)
        return out

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for held in self._held.values():
            self._read(held)
        self._held.clear()

    def _bring(self, tensors: Iterable[Tensor], changes: bool) -> set[int]:
        keys = set()
        for t in tensors:
            key = t.untyped_storage()._cdata
            held = self._held.get(key)
            if held is None or held.ref.expired():
                continue
            self._read(held)
            self._held.move_to_end(key)
            if changes:
                self._forget(held)
            keys.add(key)
        return keys

    def _note(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        key, held = storage._cdata, self._held.get(storage._cdata)
        if held is not None and held.ref.expired():
            self._drop(key)
            held = None
        if held is None and storage.nbytes() >= self.least and storage.resizable():
            self._held[key] = _Held(StorageWeakRef(storage), storage.nbytes())
            self._inside += storage.nbytes()
        return key

    def _evict(self, busy: set[int]) -> None:
        for key in [k for k, held in self._held.items() if held.ref.expired()]:
            self._drop(key)
        for key, held in self._held.items():
            if self._inside <= self.keep:
                return
            if not held.out and key not in busy:
                self._write(held)

    def _write(self, held: _Held) -> None:
        storage = torch.UntypedStorage._new_with_weak_ptr(held.ref.cdata)
        if storage is None or storage.nbytes() != held.nbytes:  # gone, or given another size by its owner
            return
        if held.at < 0:
            held.at = self._place(held.nbytes)
            _whole(os.pwritev, self._file.fileno(), storage, held.at)
            self.written += held.nbytes
        storage.resize_(0)
        held.out, self._inside = True, self._inside - held.nbytes

    def _read(self, held: _Held) -> None:
        storage = torch.UntypedStorage._new_with_weak_ptr(held.ref.cdata) if held.out else None
        if storage is not None:
            storage.resize_(held.nbytes)
            _whole(os.preadv, self._file.fileno(), storage, held.at)
            held.out, self._inside = False, self._inside + held.nbytes

    def _place(self, nbytes: int) -> int:
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        self._end += nbytes
        return self._end - nbytes

    def _forget(self, held: _Held) -> None:
        """The file's copy is no longer what memory holds."""
        if held.at >= 0:
            self._free[held.nbytes].append(held.at)
            held.at = -1

    def _drop(self, key: int) -> None:
        held = self._held.pop(key)
        self._forget(held)
        self._inside -= 0 if held.out else held.nbytes


def _tensors(tree: object) -> list[Tensor]:
    plain = (Tensor, torch.nn.Parameter)
    return [t for t in tree_leaves(tree) if type(t) in plain and t.device.type == "cpu" and t.layout is torch.strided]


def _whole(move, descriptor: int, storage: torch.UntypedStorage, at: int) -> None:  # type: ignore[no-untyped-def]
    """Read or write all of a storage; the system may move less at a time."""
    # By address: a storage that numpy has looked at can never be resized again.
    view = memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
    while len(view):
        moved = move(descriptor, [view], at)
        if not moved:
            raise OSError("the spool's file ended before its data")
        view, at = view[moved:], at + moved
