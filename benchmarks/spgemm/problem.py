"""Sparse x sparse products, and triangle counts as masked ones. Every product is checked."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from benchmarks.harness import Case
from benchmarks.spgemm.matrices import PRODUCTS, TRIANGLES, lower
from benchmarks.spgemm.solvers._entries import entries

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


def exact(case, data):
    c = data.a.astype(np.float64) @ data.b.astype(np.float64)
    return entries(c if data.mask is None else c.multiply(data.mask))


def error(output, truth):
    """The largest error of a value, or of a sum of a row, over the largest; infinite where the patterns differ."""
    same = len(output) == len(truth) and all(x.shape == y.shape for x, y in zip(output, truth))
    if not same or not all(np.array_equal(output[i], truth[i]) for i in (0, 1, 3)):
        return np.inf
    worst = [np.abs(output[i] - truth[i]).max(initial=0.0) / (np.abs(truth[i]).max(initial=0.0) or 1.0) for i in (2, 4)]
    return float(max(worst))


def work(case, data):
    terms = int(np.diff(data.b.indptr)[data.a.indices].sum())
    return {"flops": 2.0 * terms}


def export(case, data, folder):
    for name in ("a", "b", "mask"):
        if getattr(data, name) is not None:
            sparse.save_npz(folder / f"{name}.npz", getattr(data, name))
