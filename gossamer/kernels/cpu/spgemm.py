"""Sparse x sparse products on the CPU: what is allocated and handed to the kernels of `rowwise`.

Shapes: C [M, N] = A [M, K] B [K, N].
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu import rowwise, survey
from gossamer.kernels.cpu.launch import launch
from gossamer.kernels.cpu.rowlanes import BLOCK
from gossamer.kernels.cpu.rowwise import DENSE, HASH, HEAD, MASKED, PRODUCT, REFILL, SORT, WAITING
from gossamer.kernels.cpu.workplace import workplace

# Entries of a task: with their columns, what a second-level cache holds beside the accumulator.
LIST = 16384
# Terms of a task, and terms that pay for waking one more thread.
WORK, GRAIN = 65536, 20_000
# Columns up to which a dense row of sums always beats a hash table; up to which it does when there are many terms (one
# for eight columns pays for making the sums ready); and from which blocks of marks get marks of their own.
SURELY_DENSE, DENSE_COLUMNS, FAR_COLUMNS = 1 << 16, 1 << 22, 1 << 18
# Bytes of C, at its upper bound, up to which it is computed in one pass; beyond, a first pass finds the exact size.
ONE_PASS = 2 << 30
# Bytes of scratch memory that a calling thread keeps from call to call.
KEPT_SCRATCH = 16 << 20
# What a kernel makes.
PRODUCTS = {PRODUCT: "product", REFILL: "product of known pattern", MASKED: "masked product"}


class Rows(NamedTuple):
    """A matrix by rows: int64 starts, int32 columns, float32 or float64 values (None where only the pattern counts)."""

    height: int
    width: int
    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray | None

    @property
    def addresses(self) -> tuple[int, int, int]:
        values = 0 if self.values is None else self.values.ctypes.data
        return self.starts.ctypes.data, self.columns.ctypes.data, values


@dataclass(frozen=True)
class Survey:
    """What is known before a product: tasks as runs of rows, terms per row, and bounds on what will come out."""

    bounds: np.ndarray
    row_terms: np.ndarray
    threads: int
    tidy: bool
    largest: int
    entries: int
    most_terms: int

    @property
    def tasks(self) -> int:
        return len(self.bounds) - 1


@functools.cache
def survey_kernel():
    """The compiled kernel that looks factors over."""
    return survey.survey_kernel()


@functools.cache
def kernel_for(size: int, making: int):
    """The compiled kernel for values of this many bytes, and one of `PRODUCTS`."""
    return rowwise.kernel(size, making)


def look_at(a: Rows, b: Rows) -> Survey:
    """Check that two factors can be read, count the terms of every row and cut the rows into tasks.

    Raises:
        FormatError: starts do not rise to the number of entries, or a column is out of range.
    """
    threads = max(1, min(torch.get_num_threads(), (len(a.columns) + len(b.columns)) // GRAIN))
    chunks = 4 * threads if threads > 1 else 1
    cuts, terms = np.empty(a.height + 1, np.int64), np.empty(max(a.height, 1), np.int64)
    found = np.zeros((chunks, 8), np.int64)
    numbers = (chunks, a.height, a.width, b.width, len(a.columns), len(b.columns), LIST, WORK)
    run = launch(survey_kernel(), addresses=7, fixed=numbers, threads=threads).run
    run(*a.addresses[:2], *b.addresses[:2], cuts.ctypes.data, terms.ctypes.data, found.ctypes.data)
    if found[:, survey.DAMAGED].any():
        raise FormatError(
            f"the factors {a.height}x{a.width} and {b.height}x{b.width} are damaged: row starts must rise from 0 to "
            "the number of entries, and every column must lie inside; rebuild the matrix"
        )
    pieces = [cuts[a.height * c // chunks :][: found[c, survey.TASKS]] for c in range(chunks)]
    all_terms = int(found[:, survey.ALL_TERMS].sum())
    return Survey(
        bounds=np.concatenate([*pieces, np.array([a.height])]),
        row_terms=terms,
        threads=max(1, min(torch.get_num_threads(), all_terms // GRAIN)),
        tidy=int(found[:, survey.UNTIDY].sum()) == 0,
        largest=int(found[:, survey.LARGEST].max()),
        entries=int(found[:, survey.ENTRIES].sum()),
        most_terms=int(found[:, survey.MOST_TERMS].max()),
    )


def _line(count: int) -> int:
    """Bytes rounded up to whole cache lines."""
    return -(-count // 64) * 64


def _memory(kind: int, size: int, width: int, seen: Survey, masked: int | None) -> tuple[int, ...]:
    """Where a thread's accumulator, lists of terms and lists of entries lie: the fixed numbers from BITS on."""
    bound = min(seen.most_terms, width)
    bits = max(5, (2 * bound - 1).bit_length()) if bound else 5
    marks, far = _line(-(-width // 1024) * 64), _line(-(-width // 65536) * 64)
    sums, room = _line(-(-width // BLOCK) * BLOCK * size), rowwise.TERMS
    if masked is not None:
        sums, marks, far = _line((-(-masked // BLOCK) + 1) * BLOCK * size), _line(4 * width), 0
    if kind == HASH:
        sums, marks, far, room = _line(size << bits), _line(4 << bits), _line(4 * bound), max(room, bound)
    if kind == SORT:
        sums, marks, far, room = 0, 0, 0, max(room, seen.most_terms + 1)
    double = room if kind != DENSE else 0
    columns_room = _line(4 * (seen.largest + 2 * BLOCK))
    sizes = [
        sums, marks, far, _line(4 * (room + 2 * BLOCK)), _line(size * (room + 2 * BLOCK)),
        _line(4 * (double + 2 * BLOCK)), _line(size * (double + 2 * BLOCK)), _line(8 * (double // BLOCK + 4)),
    ]  # fmt: skip
    offsets = np.cumsum(sizes).tolist()
    list_bytes = HEAD + columns_room + _line(size * (seen.largest + 2 * BLOCK))
    return bits, room, offsets[-1] + WAITING * list_bytes, *offsets, list_bytes, columns_room


def _run(a: Rows, b: Rows, seen: Survey, making: int, kind: int, ordered: bool, c: Rows, mask: Rows | None) -> None:
    """One pass of a kernel; C's starts, and its entries where it has memory for them, are written."""
    size = a.values.dtype.itemsize
    masked = None if mask is None else int(np.diff(mask.starts).max(initial=0))
    memory = _memory(kind, size, b.width, seen, masked)
    threads = max(1, min(seen.threads, seen.tasks))
    ends = np.full(seen.tasks + 1, -1, np.int64)
    ends[0] = 0
    scratch_bytes = memory[2] * threads
    if scratch_bytes <= KEPT_SCRATCH:
        scratch_at = workplace.scratch_of(scratch_bytes)
    else:
        scratch = np.empty(scratch_bytes + 64, np.uint8)
        scratch_at = _line(scratch.ctypes.data)
    numbers = (seen.tasks, b.width, int(seen.tidy), kind, int(b.width > FAR_COLUMNS), int(ordered), *memory)
    run = launch(kernel_for(size, making), addresses=rowwise.ADDRESSES, fixed=numbers, threads=threads).run
    run(
        *a.addresses, *b.addresses, seen.bounds.ctypes.data, seen.row_terms.ctypes.data, ends.ctypes.data,
        *c.addresses, *((0, 0) if mask is None else mask.addresses[:2]), scratch_at,
    )  # fmt: skip


def _suiting(width: int, terms: int) -> int:
    """The accumulator for rows of this width in a product of so many terms."""
    dense = width <= SURELY_DENSE or (width <= DENSE_COLUMNS and width <= 8 * terms)
    return DENSE if dense else HASH


def product(a: Rows, b: Rows, *, mask: Rows | None = None, kind: int | None = None, ordered: bool = True) -> Rows:
    """C = A B, or those of its entries that a mask names.

    Args:
        a: [M, K].
        b: [K, N], values of the same dtype.
        mask: [M, N], its columns ascending in each row.
        kind: accumulator of rows with more than sixteen terms: DENSE, HASH or SORT; by width when None. A mask brings
            its own.
        ordered: whether columns must ascend in each row; a hash accumulator is faster without.

    Raises:
        FormatError: damaged factors.
    """
    seen = look_at(a, b)
    if mask is not None or kind is None:
        kind = DENSE if mask is not None else _suiting(b.width, int(seen.row_terms[: a.height].sum()))
    making, entries = PRODUCT, seen.entries
    if mask is not None:
        making, entries = MASKED, min(entries, len(mask.columns))
    starts = np.zeros(a.height + 1, np.int64)
    if entries * (4 + a.values.dtype.itemsize) > ONE_PASS:
        sizes_only = Rows(a.height, b.width, starts, np.empty(0, np.int32), None)
        _run(a, b, seen, making, kind, False, sizes_only, mask)
        entries = int(starts[-1])
    c = Rows(a.height, b.width, starts, np.empty(entries, np.int32), np.empty(entries, a.values.dtype))
    if entries:
        _run(a, b, seen, making, kind, ordered, c, mask)
        count = int(starts[-1])
        c.columns.resize(count, refcheck=False)
        c.values.resize(count, refcheck=False)
    return c


def refill(a: Rows, b: Rows, seen: Survey, c: Rows) -> None:
    """Compute C's values again, for other values of A and B: C's pattern is known."""
    if len(c.columns):
        _run(a, b, seen, REFILL, DENSE, True, c, None)
