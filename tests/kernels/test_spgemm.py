"""Sparse x sparse products against scipy's and dense float64 ones, over kinds, dtypes, accumulators and threads."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from gossamer import spgemm, spgemm_plan
from gossamer.core.errors import FormatError, UnknownName
from gossamer.formats import CSR
from gossamer.kernels.cpu import rowwise, survey
from gossamer.kernels.cpu import spgemm as driver

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
# Rows, inner, columns, density: single entries, empty rows, one wide row, more than one list of terms, far marks.
SIZES = [
    (1, 1, 1, 1.0),
    (33, 65, 17, 0.5),
    (50, 70, 3000, 0.1),
    (40, 30, 300_000, 0.003),
    (3, 2000, 500, 0.7),
    (9, 40, 1, 0.3),
    (0, 3, 4, 0.5),
    (3, 0, 4, 0.5),
    (7, 5, 0, 0.5),
]


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    """Work is cut finely, so that two threads meet in small matrices."""
    monkeypatch.setattr(driver, "GRAIN", 10)
    monkeypatch.setattr(driver, "LIST", 200)
    monkeypatch.setattr(driver, "WORK", 900)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(rows, columns, density, dtype=np.float32, seed=0):
    draw = np.random.default_rng(seed)
    return sparse.random_array((rows, columns), density=density, format="csr", dtype=dtype, rng=draw)


def pair(rows, inner, columns, density, dtype=np.float32):
    return drawn(rows, inner, density, dtype, 1), drawn(inner, columns, density, dtype, 2)


def exact(a, b):
    """scipy's product in float64, columns ascending."""
    c = a.astype(np.float64) @ b.astype(np.float64)
    c.sort_indices()
    return c


def same(c, truth, tolerance):
    assert c.shape == truth.shape and c.nnz == truth.nnz
    assert np.array_equal(c.indptr, truth.indptr) and np.array_equal(c.indices, truth.indices)
    assert np.allclose(c.data, truth.data, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulators", ["auto", "dense", "hash", "sort"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_scipys(size, dtype, accumulators, threads):
    a, b = pair(*size, dtype)
    c = spgemm(a, b, accumulators=accumulators)
    assert isinstance(c, sparse.csr_array) and c.dtype == dtype and c.has_canonical_format
    c.check_format(full_check=True)
    same(c, exact(a, b), 1e-5 if dtype == np.float32 else 1e-13)


def test_sums_run_in_the_order_of_a_so_threads_do_not_matter(threads):
    a, b = pair(200, 300, 4000, 0.05)
    scipys = a @ b
    scipys.sort_indices()
    assert np.array_equal(spgemm(a, b).data, scipys.data)


def test_unsorted_rows_come_out_as_a_set(threads):
    a, b = pair(60, 80, 900, 0.1)
    c = spgemm(a, b, sort=False, accumulators="hash")
    assert not c.has_sorted_indices
    c.sort_indices()
    same(c, exact(a, b), 1e-5)


@pytest.mark.parametrize("accumulators", ["auto", "hash", "sort"])
def test_unsorted_factors_duplicates_and_stored_zeros(accumulators, threads):
    draw, starts = np.random.default_rng(3), np.arange(0, 401, 8)
    columns_a, columns_b = draw.integers(0, 50, 400), draw.integers(0, 70, 400)
    values_a, values_b = draw.standard_normal(400), draw.standard_normal(400)
    values_b[::7] = 0
    rows = np.repeat(np.arange(50), 8)
    dense = [np.zeros((50, n)) for n in (50, 70, 50, 70)]
    for into, columns, values in zip(dense, (columns_a, columns_b) * 2, (values_a, values_b, 1, 1)):
        np.add.at(into, (rows, columns), values)
    a = sparse.csr_array((values_a, columns_a, starts), shape=(50, 50), copy=True)
    b = sparse.csr_array((values_b, columns_b, starts), shape=(50, 70), copy=True)
    c = spgemm(a, b, accumulators=accumulators)
    assert c.has_canonical_format and np.allclose(c.toarray(), dense[0] @ dense[1])
    assert c.nnz == np.count_nonzero(dense[2] @ dense[3])


@pytest.mark.parametrize("accumulators", ["dense", "hash", "sort"])
def test_what_cancels_or_underflows_is_still_an_entry(accumulators):
    a = sparse.csr_array(np.array([[1.0, -1.0, 1e-30]], np.float32))
    b = sparse.csr_array(np.array([[1.0] * 20, [1.0] * 20, [-1e-30] * 20], np.float32))
    c = spgemm(a, b, accumulators=accumulators)
    assert c.nnz == 20 and not c.data.any() and not np.signbit(c.data).any()


@pytest.mark.parametrize("accumulators", ["dense", "hash", "sort"])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_spread_as_in_a_sum(special, accumulators):
    a, b = pair(20, 40, 60, 0.4, np.float64)
    b.data[5] = special
    with np.errstate(invalid="ignore"):
        truth = exact(a, b)
        c = spgemm(a, b, accumulators=accumulators)
    assert np.array_equal(np.isnan(c.data), np.isnan(truth.data))
    assert np.allclose(c.data, truth.data, equal_nan=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_mask_leaves_its_own_entries_only(size, threads):
    a, b = pair(*size)
    mask = drawn(size[0], size[2], 0.3, seed=5)
    mask.data[::2] = 0
    c = spgemm(a, b, mask=mask)
    chosen = sparse.csr_array((np.ones(mask.nnz), mask.indices, mask.indptr), shape=mask.shape)
    truth = exact(a, b).multiply(chosen).tocsr()
    truth.sort_indices()
    same(c, truth, 1e-5)


def test_an_unsorted_mask_with_duplicates():
    a, b = pair(3, 30, 6, 0.9)
    mask = sparse.csr_array((np.ones(7), [5, 0, 5, 2, 1, 3, 1], [0, 3, 4, 7]), shape=(3, 6))
    c = spgemm(a, b, mask=mask)
    assert c.has_canonical_format and c.indptr.tolist() == [0, 2, 3, 5] and c.indices.tolist() == [0, 5, 2, 1, 3]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_plan_takes_other_values(size, threads):
    a, b = pair(*size)
    plan = spgemm_plan(a, b)
    same(plan.run(), exact(a, b), 1e-5)
    a2, b2 = a.copy(), b.copy()
    a2.data, b2.data = a.data[::-1].copy() + 1, b.data - 2
    same(plan.run(torch.from_numpy(a2.data)), exact(a2, b), 1e-4)
    same(plan.run(b_values=b2.data), exact(a, b2), 1e-4)
    with pytest.raises(FormatError, match="one per entry"):
        plan.run(np.ones(a.nnz + 1))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_torch_in_torch_out(index):
    a, b = (torch.randn(*s) * (torch.rand(*s) < 0.2) for s in ((30, 40), (40, 50)))
    parts = [x.to_sparse_csr() for x in (a, b)]
    parts = [
        torch.sparse_csr_tensor(p.crow_indices().to(index), p.col_indices().to(index), p.values(), p.shape)
        for p in parts
    ]
    c = spgemm(*parts)
    assert c.layout is torch.sparse_csr and c.col_indices().dtype == index and c.dtype == torch.float32
    assert torch.allclose(c.to_dense(), a @ b, atol=1e-5)


@pytest.mark.parametrize("columns", [50, 70_000])
def test_our_csr_in_our_csr_out(columns):
    a, b = (torch.randn(*s) * (torch.rand(*s) < 0.1) for s in ((30, 40), (40, columns)))
    c = spgemm(CSR.from_dense(a), CSR.from_dense(b), sort=False, accumulators="hash")
    assert isinstance(c, CSR) and torch.allclose(c.to_dense(), a @ b, atol=1e-5)
    kept = CSR.from_parts(dict(zip(CSR.PARTS, (c.indptr, c.indices, c.values))), {"rows": c.rows, "cols": c.cols})
    assert kept.nnz == c.nnz


def test_dtypes():
    a, b = pair(20, 30, 40, 0.3)
    assert spgemm(a, b.astype(np.float64)).dtype == np.float64
    assert spgemm(a, b, dtype=torch.float64).dtype == np.float64
    whole = sparse.csr_array((a.toarray() > 0).astype(np.int64))
    with pytest.raises(FormatError, match="pass dtype="):
        spgemm(whole, whole.T)
    counts = spgemm(whole, sparse.csr_array(whole.T), dtype="float32")
    assert np.array_equal(counts.toarray(), (whole @ whole.T).toarray())
    half = CSR.from_dense(torch.eye(4, dtype=torch.bfloat16))
    assert spgemm(half, half).values.dtype == torch.float32


def test_two_passes_where_memory_would_not_do(monkeypatch, threads):
    monkeypatch.setattr(driver, "ONE_PASS", 100)
    a, b = pair(50, 70, 3000, 0.1)
    same(spgemm(a, b), exact(a, b), 1e-5)
    mask = drawn(50, 3000, 0.3, seed=5)
    assert spgemm(a, b, mask=mask).nnz == exact(a, b).multiply(mask).nnz


def test_very_wide_rows_are_hashed(monkeypatch):
    a, b = pair(40, 60, 3_000_000, 0.0005)
    seen = []
    run = driver._run
    monkeypatch.setattr(driver, "_run", lambda *given: seen.append(given[4]) or run(*given))
    same(spgemm(a, b), exact(a, b), 1e-5)
    assert seen == [rowwise.HASH]


def test_memory_between_calls_is_anything():
    """Accumulators are made ready by every call, whatever another kernel left in the scratch memory."""
    a, b = pair(50, 70, 3000, 0.1)
    for accumulators in ("dense", "hash", "sort"):
        driver.workplace.scratch_of(1 << 20)
        driver.workplace.scratch.fill_(torch.nan)
        same(spgemm(a, b, accumulators=accumulators), exact(a, b), 1e-5)


def test_concurrent_calls(threads):
    pairs = [pair(60 + 7 * i, 80, 500 + 31 * i, 0.1) for i in range(6)]
    plan = spgemm_plan(*pairs[0])
    with ThreadPoolExecutor(4) as pool:
        many = list(pool.map(lambda p: spgemm(*p), pairs * 5))
        planned = list(pool.map(lambda i: plan.run(pairs[0][0].data * i), range(20)))
    for got, (a, b) in zip(many, pairs * 5):
        same(got, exact(a, b), 1e-5)
    for i, got in enumerate(planned):
        assert np.allclose(got.data, i * planned[1].data, atol=1e-5)


def test_tasks_cover_every_row_once(threads):
    a, b = pair(500, 300, 400, 0.05)
    one, two = (driver.Rows(*x.shape, x.indptr.astype(np.int64), x.indices, x.data) for x in (a, b))
    seen = driver.look_at(one, two)
    terms = np.add.reduceat(np.append(np.diff(b.indptr)[a.indices], 0), a.indptr[:-1]) * (np.diff(a.indptr) > 0)
    assert np.array_equal(seen.row_terms, terms) and (np.diff(seen.bounds) > 0).all()
    assert seen.bounds[0] == 0 and seen.bounds[-1] == 500 and seen.entries >= (a @ b).nnz
    work = [terms[f:u].sum() + survey.ROW_WORK * (u - f) for f, u in zip(seen.bounds, seen.bounds[1:])]
    assert all(w <= driver.WORK or u - f == 1 for w, f, u in zip(work, seen.bounds, seen.bounds[1:]))


def _damaged(change):
    a = drawn(10, 10, 0.5)
    change(a)
    return a


DAMAGE = {
    "column too high": lambda a: a.indices.__setitem__(3, 10),
    "column negative": lambda a: a.indices.__setitem__(3, -1),
    "starts fall": lambda a: a.indptr.__setitem__(4, 50),
    "starts begin late": lambda a: a.indptr.__setitem__(0, 1),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_factors_are_refused(change):
    good, bad = drawn(10, 10, 0.5), _damaged(change)
    for factors in ((good, bad), (bad, good)):
        with pytest.raises(FormatError, match="damaged"):
            spgemm(*factors)
    with pytest.raises(FormatError, match="damaged"):
        spgemm(good, good, mask=bad)


def test_what_does_not_fit_is_refused_in_words():
    a = drawn(4, 5, 0.5)
    with pytest.raises(FormatError, match="A needs B's rows"):
        spgemm(a, a)
    with pytest.raises(FormatError, match="the mask is 4x5, C is 4x4"):
        spgemm(a, sparse.csr_array(a.T), mask=a)
    with pytest.raises(FormatError, match="got ndarray"):
        spgemm(a.toarray(), a)
    with pytest.raises(FormatError, match="to_sparse_csr"):
        spgemm(torch.eye(3), torch.eye(3))
    with pytest.raises(FormatError, match="float32 or float64"):
        spgemm(a, sparse.csr_array(a.T), dtype="float16")
    with pytest.raises(FormatError, match="leave it at 'auto'"):
        spgemm(a, sparse.csr_array(a.T), mask=drawn(4, 4, 0.5), accumulators="hash")
    with pytest.raises(UnknownName, match="hash"):
        spgemm(a, sparse.csr_array(a.T), accumulators="hahs")
    wants = torch.eye(3).to_sparse_csr().requires_grad_()
    with pytest.raises(FormatError, match="no gradient"):
        spgemm(wants, wants)
    wide = sparse.csr_array((np.ones(1, np.float32), np.array([2**32 + 1]), np.array([0, 1, 1])), shape=(2, 2**33))
    with pytest.raises(FormatError, match="columns"):
        spgemm(sparse.csr_array(np.eye(2, dtype=np.float32)), wide)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages with Linux's mmap and mprotect")
def test_nothing_beyond_the_factors_is_read():
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, f"exit code {child.returncode} (a negative one is a signal): {child.stderr[-2000:]}"


def _guarded(array):
    """A copy whose last byte touches an unreadable page."""
    page, size = os.sysconf("SC_PAGESIZE"), array.nbytes
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    room = -(-size // page) * page
    base = library.mmap(None, room + page, 3, 0x22, -1, 0)
    library.mprotect(base + room, page, 0)
    copy = np.frombuffer((ctypes.c_uint8 * size).from_address(base + room - size), array.dtype)
    copy[:] = array
    return copy


def _read_guarded():
    for rows, inner, columns, density in SIZES[:5]:
        for dtype in (np.float32, np.float64):
            plain = pair(rows, inner, columns, density, dtype)
            a, b = (driver.Rows(*x.shape, x.indptr.astype(np.int64), x.indices, x.data) for x in plain)
            tight = [
                x._replace(**{f: _guarded(getattr(x, f)) for f in ("starts", "columns", "values")}) for x in (a, b)
            ]
            for kind in (rowwise.DENSE, rowwise.HASH, rowwise.SORT):
                c, same_c = driver.product(a, b, kind=kind), driver.product(*tight, kind=kind)
                assert np.array_equal(c.values, same_c.values)
            mask = c._replace(starts=_guarded(c.starts), columns=_guarded(c.columns), values=None)
            assert len(driver.product(*tight, mask=mask).columns) == len(c.columns)
            driver.refill(*tight, driver.look_at(*tight), c._replace(columns=mask.columns, values=_guarded(c.values)))


if __name__ == "__main__":
    _read_guarded()
