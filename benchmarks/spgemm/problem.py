"""Sparse x sparse products, and triangle counts as masked ones. Products are checked entry by entry."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from benchmarks.harness import Case
from benchmarks.spgemm.matrices import PRODUCTS, TRIANGLES, lower

NAME, TITLE = "spgemm", "Sparse x sparse: C = A B in CSR, float32"
# Float32 sums of up to thousands of terms, against the largest entry.
TOLERANCE = 1e-5
CASES = [
    *(Case(n, {"product": n, "data": d, "mask": "no"}, quick=n in ("grid", "terms")) for n, (d, _) in PRODUCTS.items()),
    *(Case(n, {"product": n, "data": d, "mask": "yes"}, quick=False) for n, (d, _) in TRIANGLES.items()),
]
GROUPS = {"scipy or GraphBLAS": ("scipy_csr", "graphblas"), "MKL": ("mkl",)}


@dataclass(frozen=True)
class Factors:
    """A, B and, where only some entries are wanted, a mask."""

    a: sparse.csr_array
    b: sparse.csr_array
    mask: sparse.csr_array | None


def build(case):
    if case.id in TRIANGLES:
        low = lower(TRIANGLES[case.id][1]())
        return Factors(low, low, low)
    return Factors(*PRODUCTS[case.id][1](), None)


def entries(c):
    """Starts, columns and values, columns ascending and without stored zeros, which scipy never stores."""
    c = sparse.csr_array(c)
    c.eliminate_zeros()
    c.sort_indices()
    return c.indptr.astype(np.int64), c.indices.astype(np.int64), c.data


def exact(case, data):
    c = data.a.astype(np.float64) @ data.b.astype(np.float64)
    return entries(c if data.mask is None else c.multiply(data.mask))


def error(output, truth):
    """The largest error of an entry over the largest entry; infinite where the patterns differ."""
    if len(output) != 3 or any(x.shape != y.shape for x, y in zip(output, truth)):
        return np.inf
    if not all(np.array_equal(x, y) for x, y in zip(output[:2], truth[:2])):
        return np.inf
    largest = np.abs(truth[2]).max(initial=0.0) or 1.0
    return float(np.abs(output[2] - truth[2]).max(initial=0.0) / largest)


def work(case, data):
    terms = int(np.diff(data.b.indptr)[data.a.indices].sum())
    return {"flops": 2.0 * terms}


def export(case, data, folder):
    for name in ("a", "b", "mask"):
        if getattr(data, name) is not None:
            sparse.save_npz(folder / f"{name}.npz", getattr(data, name))
