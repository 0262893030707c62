"""The sparse product on panels in place, against float64 torch: odd shapes, poison around and between, both threads."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import FormatError, UnknownName
from gossamer.kernels.cpu import spmm_panels as product
from gossamer.kernels.cpu.arrange import arrange
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.shares import share_out
from gossamer.kernels.cpu.spmm_panels import plan_panels, spmm_panels
from gossamer.kernels.cpu.stream import stream
from gossamer.kernels.reference import ACTIVATIONS
from gossamer.runtime.sequence import NativeSequence
from tests.kernels.test_cpu_spmm import threads, weights  # noqa: F401

LIMIT = 2e-6


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(product, "GRAIN", 1)


def guarded(*shape):
    """Aligned panels of NaN with a cache line of NaN on either side."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 48,), torch.nan)
    first = 16 + -(whole.data_ptr() // 4) % 16
    return whole[first : first + count].view(shape), (whole[:first], whole[first + count :])


def cut_into(blocks):
    """Cut columns into about so many blocks, whatever the caches hold."""
    return patch.object(product, "blocks_for", lambda stream, wide: blocks) if blocks else nullcontext()


def untouched(sides):
    return all(bool(side.isnan().all()) for side in sides)


def exact(w, x, bias, residual, activation):
    z = torch.einsum("mk,pkw->pmw", w.double(), x.double())
    z = z if bias is None else z + bias.double()[:, None]
    return ACTIVATIONS[activation](z if residual is None else z + residual.double())


def within(got, w, x, bias, residual, activation):
    size = torch.einsum("mk,pkw->pmw", w.double().abs(), x.double().abs()) + 10
    error = (got.double() - exact(w, x, bias, residual, activation)).abs() / size
    return bool(error.isfinite().all()) and float(error.max()) < LIMIT


sizes = st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 3), st.integers(1, 150))


@settings(max_examples=60, deadline=None)
@given(
    sizes,
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.sampled_from((None, 2, 37)),
    st.booleans(),
    st.sampled_from((None, "apart", "in place")),
    st.sampled_from(tuple(ACTIVATIONS)),
)
def test_any_shape_matches_float64_inside_poison(size, g, density, blocks, wide, residual, activation):
    rows, cols, panels, used = size
    width = plane_stride(used)
    weight, w = weights(rows, cols, g, density, dtype=torch.int32 if wide else torch.uint16)
    x, _ = guarded(panels, cols, width)
    y, sides = guarded(panels, rows, width)
    x[..., :used], bias, added = torch.randn(panels, cols, used), torch.randn(rows), None
    if residual:
        added, _ = guarded(panels, rows, width) if residual == "apart" else (y, None)
        added[..., :used] = torch.randn(panels, rows, used)
    before = None if added is None else added[..., :used].clone()
    with cut_into(blocks):
        assert spmm_panels(weight, x, bias, activation, added, y, used=used) is y
    assert within(y[..., :used], w, x[..., :used], bias, before, activation)
    assert untouched(sides) and untouched([y[..., -(-used // 16) * 16 :]])


@pytest.mark.parametrize("g", [1, 2, 4, 8])
@pytest.mark.parametrize("used", [16, 31, 48, 64, 96, 196])
def test_every_tile_width(g, used, threads):  # noqa: F811
    weight, w = weights(70, 90, g, 0.3)
    x, _ = guarded(2, 90, plane_stride(used))
    x[:] = torch.randn(x.shape)
    bias = torch.randn(70)
    assert within(spmm_panels(weight, x, bias, used=used)[..., :used], w, x[..., :used], bias, None, "none")
    assert within(spmm_panels(weight, x, None, "relu"), w, x, None, None, "relu")


def test_padding_that_is_not_finite_stays_in_its_lane():
    weight, w = weights(20, 30, 4, 0.5)
    x, _ = guarded(1, 30, 64)
    x[..., :50] = torch.randn(1, 30, 50)
    y = spmm_panels(weight, x, None, "gelu", used=50)
    assert within(y[..., :50], w, x[..., :50], None, None, "gelu") and bool(y[..., 50:64].isnan().all())


def test_last_panel_may_be_used_less():
    weight, w = weights(20, 30, 1, 0.5)
    x, _ = guarded(3, 30, 64)
    x[:] = torch.randn(x.shape)
    y, _ = guarded(3, 20, 64)
    plan = plan_panels(weight, panels=3, width=64, used_last=16, threads=1)
    plan.run(x.data_ptr(), y.data_ptr(), 0)
    assert within(y[:2], w, x[:2], None, None, "none") and within(y[2:, :, :16], w, x[2:, :, :16], None, None, "none")
    assert bool(y[2, :, 16:].isnan().all())


@pytest.mark.parametrize("g", [1, 4])
def test_same_bits_on_every_run_and_thread_count(g):
    weight, _ = weights(100, 200, g, 0.2)
    x, results = product.aligned_panels(2, 200, 80).normal_(), []
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        results += [spmm_panels(weight, x, None, "silu") for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)


def test_one_plan_on_four_python_threads():
    weight, w = weights(60, 90, 4, 0.3)
    plan = plan_panels(weight, panels=2, width=64, residual=True, activation="relu", threads=2)

    def run(seed):
        draw = torch.Generator().manual_seed(seed)
        x = product.aligned_panels(2, 90, 64).normal_(generator=draw)
        added, y = (product.aligned_panels(2, 60, 64).normal_(generator=draw) for _ in range(2))
        for _ in range(100):
            plan.run(x.data_ptr(), y.data_ptr(), 0, added.data_ptr())
            if not within(y, w, x, None, added, "relu"):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


@pytest.mark.parametrize("vectors", [[4, 4], [13], [3, 3, 1], [1], [7, 7, 7, 7]])
@pytest.mark.parametrize("workers", [1, 2, 3, 6])
@pytest.mark.parametrize(("together", "alike", "line"), [(1, True, 1), (2, True, 2), (1, False, 4)])
def test_every_vector_of_every_group_is_done_once(vectors, workers, together, alike, line):
    weight, _ = weights(40, 30, 2, 0.4)
    work = share_out(vectors, 4, together, arrange(weight, 2), workers, alike=alike, line=line)
    done = torch.zeros(len(vectors), max(vectors), weight.groups, dtype=torch.int64)
    for t0, t1, i0, i1 in work.tasks_T4.tolist():
        for panel, first, count in work.tiles_Q3[t0:t1].tolist():
            assert 0 < count <= 4 and first + count <= vectors[panel]
            done[panel, first : first + count, i0:i1] += 1
    assert all(bool((done[p, :n] == 1).all()) and not done[p, n:].any() for p, n in enumerate(vectors))
    assert work.share_starts[0] == 0 and work.share_starts[-1] == len(work.tasks_T4)
    assert len(work.share_starts) == min(workers, 4) + 1


def test_rows_of_unequal_length_are_cut_by_entries():
    rows, cols = 64, 400
    w = torch.zeros(rows, cols)
    w[:8] = 1.0
    row, column = w.nonzero(as_tuple=True)
    indptr = torch.zeros(rows + 1, dtype=torch.int32)
    indptr[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    long_first = stream(1, rows, cols, indptr, column.to(torch.uint16), w[row, column])
    cuts = share_out([5], 4, 1, arrange(long_first, 1), 2).tasks_T4[:4, 2:].tolist()
    assert cuts[0][0] == 0 and cuts[-1][1] == rows and cuts[1][1] <= 5


def test_shares_nearly_even_keep_their_positions_and_whole_cache_lines():
    weight, _ = weights(40, 30, 2, 0.4)
    for vectors, line, want in ((13, 1, 6), (13, 2, 6), (14, 2, 8), (14, 1, 7), (53, 4, 28)):
        work = share_out([vectors], 4, 1, arrange(weight, 1), 2, line=line)
        owned = [work.tiles_Q3[t0:t1, 2].sum() for t0, t1 in work.tasks_T4[:, :2].tolist()]
        assert sum(owned[: work.share_starts[1]]) == want and sum(owned) == vectors


def test_arranged_blocks_hold_the_same_entries_in_reading_order():
    weight, w = weights(20, 50, 4, 0.4)
    cut = arrange(weight, 3)
    again = torch.zeros(cut.blocks, 5, 50, 4)
    for run, (s, e) in enumerate(zip(cut.starts_R, cut.starts_R[1:])):
        columns = cut.indices_E[s:e].long()
        assert bool(((columns // 17) == run // 5).all()) and bool((columns.diff() > 0).all())
        again[run // 5, run % 5, columns] = cut.values_EG[s:e]
    assert torch.equal(again.sum(0).transpose(1, 2).reshape(20, 50), w)
    assert arrange(weight, 1).values_EG.data_ptr() == weight.values_EG.data_ptr()


def test_values_changed_in_place_are_seen():
    weight, w = weights(40, 300, 1, 0.3)
    x = product.aligned_panels(1, 300, 64).normal_()
    with cut_into(3):
        spmm_panels(weight, x)
        weight.values_EG.mul_(2)
        assert within(spmm_panels(weight, x), 2 * w, x, None, None, "none")


def test_threads_that_lay_out_at_once_share_one_arranged_copy(monkeypatch):
    weight, _ = weights(9, 40, 1, 0.5)

    def slowly(*asked):
        time.sleep(0.02)
        return arrange(*asked)

    monkeypatch.setattr(product, "arrange", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: product.arranged_for(weight, 3), range(4)))
    assert all(copy is found[0] for copy in found)


def test_many_places_keep_within_their_counters():
    weight, _ = weights(40, 30, 1, 0.4)
    work = share_out([4] * 100_000, 4, 1, arrange(weight, 1), 2)
    assert work.share_starts.diff().max() < 40_000 and work.together > 1


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_several_layers_as_one_native_call_run_again_and_again(workers):
    first, w1 = weights(40, 30, 4, 0.4)
    second, w2 = weights(20, 40, 1, 0.4)
    x, hidden, y = (product.aligned_panels(2, n, 112).normal_() for n in (30, 40, 20))
    plans = [plan_panels(s, panels=2, width=112, used=100, activation="relu", threads=workers) for s in (first, second)]
    calls = [(plans[0], (x.data_ptr(), hidden.data_ptr(), 0)), (plans[1], (hidden.data_ptr(), y.data_ptr(), 0))]
    scratch = torch.empty(max(p.scratch_bytes for p in plans) // 4 + 64)
    chain = NativeSequence(calls, -(-scratch.data_ptr() // 64) * 64, workers)
    for _ in range(50):
        x.normal_()
        chain.run([])
        want = exact(w2, exact(w1, x, None, None, "relu"), None, None, "relu")[..., :100]
        assert float((y[..., :100] - want).abs().max()) < 1e-4


def test_no_entries_no_rows_no_panels():
    empty, _ = weights(6, 5, 4, 0.0)
    bias = torch.arange(6.0)
    x = product.aligned_panels(1, 5, 16).fill_(torch.nan)
    assert torch.equal(spmm_panels(empty, x, bias)[0], bias[:, None].expand(6, 16))
    assert spmm_panels(empty, product.aligned_panels(0, 5, 16)).shape == (0, 6, 16)


def test_wrong_inputs_are_refused_by_name():
    weight, _ = weights(8, 8, 1, 0.5)
    x = product.aligned_panels(2, 8, 32).normal_()
    shifted = torch.empty(2 * 8 * 32 + 20)[1 + -(torch.empty(0).data_ptr() // 4) % 16 :][: 2 * 8 * 32].view(2, 8, 32)
    for call, words in [
        (lambda: spmm_panels(weight, x[:, :7]), "x must be"),
        (lambda: spmm_panels(weight, x.double()), "x must be"),
        (lambda: spmm_panels(weight, x, torch.randn(7)), "bias"),
        (lambda: spmm_panels(weight, x, out=torch.empty(2, 8, 16)), "out must be"),
        (lambda: spmm_panels(weight, x, out=x), "overlaps x"),
        (lambda: spmm_panels(weight, x, residual_PMW=torch.empty(1)), "residual must be"),
        (lambda: spmm_panels(weight, x, used=33), "used positions"),
        (lambda: plan_panels(weight, panels=1, width=24, threads=1), "multiple of 16"),
    ]:
        with pytest.raises(FormatError, match=words):
            call()
    if shifted.data_ptr() % 64:
        with pytest.raises(FormatError, match="64-byte"):
            spmm_panels(weight, shifted)
    with pytest.raises(UnknownName, match="gelu"):
        spmm_panels(weight, x, activation="gulu")
