"""Sparse x sparse products: C = A B for scipy matrices, torch CSR tensors and our own CSR.

Shapes: A [M, K], B [K, N], C [M, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from gossamer.core.errors import DispatchError, FormatError, unknown
from gossamer.formats import CSR
from gossamer.formats.checks import LARGEST_POINTER, index_dtype

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from gossamer.kernels.cpu.spgemm import Rows, Survey

    Sparse = csr_array | Tensor | CSR

ACCUMULATORS = ("auto", "dense", "hash", "sort")
_FLOATS = {"float32": np.float32, "float64": np.float64}


@dataclass(frozen=True)
class _Read:
    """A matrix taken apart: its kind ("scipy", "torch" or "csr"), its arrays, and the width of its indices."""

    kind: str
    shape: tuple[int, int]
    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    index_bytes: int

    def rows(self, dtype: np.dtype | None) -> Rows:
        """The arrays as kernels read them; values are left out when no dtype is given."""
        from gossamer.kernels.cpu.spgemm import Rows

        values = None if dtype is None else np.ascontiguousarray(self.values, dtype)
        return Rows(*self.shape, np.ascontiguousarray(self.starts, np.int64), _narrow(self), values)


def _narrow(read: _Read) -> np.ndarray:
    """Columns as int32, once they are seen to fit."""
    if read.shape[1] > LARGEST_POINTER:
        raise FormatError(f"spgemm takes up to {LARGEST_POINTER} columns, got {read.shape[1]}; split the matrix")
    columns = read.columns
    if columns.dtype.itemsize == 8 and len(columns) and not 0 <= columns.min() <= columns.max() <= LARGEST_POINTER:
        raise FormatError(f"column indices must lie in [0, {read.shape[1]}), got {columns.min()} to {columns.max()}")
    return np.ascontiguousarray(columns, np.int32)


def _numbers(tensor: Tensor, name: str) -> np.ndarray:
    """A tensor's memory as numpy sees it; bfloat16 and float16 are widened, which is exact."""
    if tensor.layout is not torch.strided:
        raise FormatError(f"{name} holds a part in the layout {tensor.layout}; call .to_dense() on that part")
    if not tensor.is_cpu:
        raise FormatError(f"spgemm runs on the CPU, {name} is on {tensor.device}; move it with .cpu()")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise FormatError(f"spgemm has no gradient and {name} wants one; detach it, or call under torch.no_grad()")
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.float() if narrow else tensor).detach().contiguous().numpy()


def _read(x, name: str) -> _Read:
    """Take a matrix apart, whichever library it comes from.

    Raises:
        FormatError: it is dense, damaged, of another layout, on another device, or wants a gradient.
    """
    read = _taken_apart(x, name)
    arrays = (read.starts, read.columns, read.values)
    if any(a.ndim != 1 for a in arrays) or any(a.dtype.kind not in "iu" for a in arrays[:2]):
        got = ", ".join(f"{a.dtype} {a.shape}" for a in arrays)
        raise FormatError(f"{name} needs flat whole-numbered starts and columns and flat values, got {got}; rebuild it")
    counts = [len(a) for a in arrays]
    if counts[0] != read.shape[0] + 1 or counts[1] != counts[2]:
        raise FormatError(
            f"{name} of {read.shape[0]} rows needs one start more, and a value for each column index; got {counts[0]} "
            f"starts, {counts[1]} indices and {counts[2]} values; rebuild it"
        )
    return read


def _taken_apart(x, name: str) -> _Read:
    if isinstance(x, CSR):
        arrays = [_numbers(part, name) for part in (x.indptr, x.indices, x.values)]
        return _Read("csr", (x.rows, x.cols), *arrays, 4)
    if isinstance(x, Tensor):
        if x.layout is not torch.sparse_csr or x.dim() != 2:
            raise FormatError(f"{name} must be a 2-D sparse CSR tensor, got {x.layout}; call .to_sparse_csr()")
        arrays = [_numbers(part, name) for part in (x.crow_indices(), x.col_indices(), x.values())]
        return _Read("torch", tuple(x.shape), *arrays, x.col_indices().element_size())
    if type(x).__module__.startswith("scipy.sparse") and getattr(x, "ndim", 0) == 2:
        x = x.tocsr()
        return _Read("scipy", x.shape, x.indptr, x.indices, x.data, x.indices.dtype.itemsize)
    raise FormatError(f"{name} must be a scipy sparse matrix, a torch CSR tensor or a CSR, got {type(x).__name__}")


def _dtype(wanted, *reads: _Read) -> np.dtype:
    """float32 or float64: what is asked for, else what the factors are."""
    if wanted is not None:
        named = str(wanted).removeprefix("torch.") if isinstance(wanted, torch.dtype) else np.dtype(wanted).name
        if named not in _FLOATS:
            raise FormatError(f"spgemm computes in float32 or float64, got dtype={wanted}; choose one of them")
        if any(read.values.dtype.kind not in "fiub" for read in reads):
            raise FormatError(f"values must be real numbers, got {', '.join(str(r.values.dtype) for r in reads)}")
        return np.dtype(_FLOATS[named])
    found = np.result_type(*(read.values.dtype for read in reads))
    if found.name not in _FLOATS:
        raise FormatError(f"spgemm computes in float32 or float64, the values are {found}; pass dtype='float32'")
    return found


def _same_inner(a: _Read, b: _Read) -> None:
    if a.shape[1] != b.shape[0]:
        raise FormatError(f"A is {a.shape[0]}x{a.shape[1]} and B is {b.shape[0]}x{b.shape[1]}: A needs B's rows")


def _wrap(c: Rows, like: _Read, ordered: bool) -> Sparse:
    """C in the kind of A: indices as wide as A's, or int64 once there are too many entries for int32."""
    wide = like.index_bytes == 8 or len(c.columns) > LARGEST_POINTER
    index = np.int64 if wide else np.int32
    starts, columns = c.starts.astype(index, copy=False), c.columns.astype(index, copy=False)
    if like.kind == "scipy":
        from scipy.sparse import csr_array

        made = csr_array((c.values, columns, starts), shape=(c.height, c.width))
        made.has_sorted_indices = made.has_canonical_format = ordered
        return made
    parts = torch.from_numpy(starts), torch.from_numpy(columns), torch.from_numpy(c.values)
    if like.kind == "torch":
        return torch.sparse_csr_tensor(*parts, size=(c.height, c.width), check_invariants=False)
    if wide:
        raise FormatError(f"C has {len(c.columns)} entries, a CSR holds 2^31 - 1; take scipy or torch matrices")
    return CSR(c.height, c.width, parts[0], parts[1].to(index_dtype(c.width)), parts[2])


def _mask_rows(mask, a: _Read, b: _Read) -> Rows:
    """The mask's pattern, ascending in each row."""
    from gossamer.kernels.cpu.spgemm import Rows, look_at

    read = _read(mask, "mask")
    if read.shape != (a.shape[0], b.shape[1]):
        raise FormatError(f"the mask is {read.shape[0]}x{read.shape[1]}, C is {a.shape[0]}x{b.shape[1]}; make it so")
    rows = read.rows(None)
    nothing = Rows(0, rows.height, np.zeros(1, np.int64), np.empty(0, np.int32), None)
    if look_at(nothing, rows).tidy:
        return rows
    owners = np.repeat(np.arange(rows.height), np.diff(rows.starts))
    return rows._replace(columns=np.ascontiguousarray(rows.columns[np.lexsort((rows.columns, owners))]))


def _kind(name: str, masked: bool) -> int | None:
    if name not in ACCUMULATORS:
        raise unknown("accumulator", name, ACCUMULATORS)
    if masked and name != "auto":
        raise FormatError(f"a mask brings its own accumulator, got accumulators={name!r}; leave it at 'auto'")
    return None if name == "auto" else ACCUMULATORS.index(name) - 1


def _need_compiler() -> None:
    from gossamer.kernels.sparse import cannot_run_here

    if reason := cannot_run_here("spgemm", "spgemm"):
        raise DispatchError(f"spgemm cannot run: {reason}; install numba, or multiply with scipy's A @ B")


def spgemm(
    A: Sparse,
    B: Sparse,
    *,
    mask: Sparse | None = None,
    sort: bool = True,
    dtype: torch.dtype | np.dtype | str | None = None,
    accumulators: Literal["auto", "dense", "hash", "sort"] = "auto",
) -> Sparse:
    """Multiply two sparse matrices row by row: C[i, :] = sum over k of A[i, k] B[k, :].

    Each row of C is summed in the accumulator that suits it: up to 16 terms are sorted in one register, more go to a
    dense row of sums, or to a hash table where rows are millions of columns wide or the product is small against them.
    Threads follow `torch.set_num_threads`; the result does not depend on them. Inputs may be unsorted and hold
    duplicates, which are added, and explicit zeros, which count as entries. C holds every entry with at least one term,
    also where the terms cancel to zero. NaN and infinity spread as in a sum of products.

    Args:
        A: [M, K], a scipy sparse matrix or array, a 2-D torch sparse CSR tensor, or a `CSR`, in float32 or float64.
        B: [K, N], of any of these kinds.
        mask: [M, N]: only entries that it stores, whatever their value, are computed.
        sort: whether columns must ascend in each row; False is faster where hashing is used.
        dtype: float32 or float64 to compute in; the factors' own when None.
        accumulators: "dense", "hash" or "sort" for all rows of more than 16 terms; by width when "auto".

    Returns:
        C in the kind of A (a `csr_array` for scipy's), with A's index type, or int64 from 2^31 entries.

    Raises:
        FormatError: shapes, kinds, dtypes or devices do not fit, indices are damaged, or a gradient is wanted.
        UnknownName: no such accumulator.
        DispatchError: the kernels' compiler, numba, is missing.

    Example:
        >>> A = torch.eye(3).to_sparse_csr()
        >>> gossamer.spgemm(A, A).values().tolist()
        [1.0, 1.0, 1.0]

    Reference: Shivdikar, SMASH: Sparse Matrix Atomic Scratchpad Hashing, 2021 (the row-wise product that merges terms
    as they arise); Gustavson, Two fast algorithms for sparse matrices, 1978.
    Departs from: SMASH merges terms by atomic additions into a shared scratchpad of a special processor; here a row
    belongs to one thread, whose caches are the scratchpad, and only the order of tasks and of results is atomic.
    """
    kind = _kind(accumulators, mask is not None)
    a, b = _read(A, "A"), _read(B, "B")
    _same_inner(a, b)
    _need_compiler()
    from gossamer.kernels.cpu.spgemm import product

    chosen, ordered = _dtype(dtype, a, b), sort or a.kind == "csr"
    pattern = None if mask is None else _mask_rows(mask, a, b)
    return _wrap(product(a.rows(chosen), b.rows(chosen), mask=pattern, kind=kind, ordered=ordered), a, ordered)


def spgemm_plan(A: Sparse, B: Sparse, *, dtype: torch.dtype | np.dtype | str | None = None) -> SpgemmPlan:
    """Find out C's pattern once, to multiply matrices of these patterns again and again with other values.

    Args:
        A: [M, K] in CSR, as `spgemm` takes it.
        B: [K, N] in CSR.
        dtype: as in `spgemm`.

    Raises:
        FormatError: as `spgemm` does.

    Example:
        >>> plan = spgemm_plan(A, B)
        >>> C = plan.run(2 * A.data)
    """
    a, b = _read(A, "A"), _read(B, "B")
    _same_inner(a, b)
    _need_compiler()
    from gossamer.kernels.cpu.spgemm import look_at, product

    chosen = _dtype(dtype, a, b)
    rows_a, rows_b = a.rows(chosen), b.rows(chosen)
    return SpgemmPlan(a, rows_a, rows_b, product(rows_a, rows_b), look_at(rows_a, rows_b))


@dataclass(frozen=True, eq=False)
class SpgemmPlan:
    """A product whose pattern is known. Made by `spgemm_plan`; safe to use from several threads."""

    like: _Read
    a: Rows
    b: Rows
    c: Rows
    seen: Survey

    def run(self, a_values: np.ndarray | Tensor | None = None, b_values: np.ndarray | Tensor | None = None) -> Sparse:
        """Multiply with these values in place of the planned ones. All results share C's index arrays.

        Args:
            a_values: A's entries, in the order of its CSR; those of the plan when None.
            b_values: B's entries.

        Raises:
            FormatError: as many values as entries are needed.
        """
        from gossamer.kernels.cpu.spgemm import refill

        a, b = _with_values(self.a, a_values, "a_values"), _with_values(self.b, b_values, "b_values")
        c = self.c._replace(values=np.empty_like(self.c.values))
        refill(a, b, self.seen, c)
        return _wrap(c, self.like, True)


def _with_values(rows: Rows, values: np.ndarray | Tensor | None, name: str) -> Rows:
    if values is None:
        return rows
    numbers = _numbers(values, name) if isinstance(values, Tensor) else np.asarray(values)
    if numbers.shape != rows.columns.shape:
        raise FormatError(f"{name} must have shape ({len(rows.columns)},), one per entry, got {numbers.shape}")
    return rows._replace(values=np.ascontiguousarray(numbers, rows.values.dtype))
