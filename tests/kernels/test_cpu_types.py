"""Sparse products on bfloat16 panels against their twin and float64: odd shapes, poison around, both thread counts."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import FormatError, UnknownName
from gossamer.formats import CSR, RowGrouped
from gossamer.kernels.cpu import narrow_panels
from gossamer.kernels.cpu.narrow import narrow
from gossamer.kernels.cpu.spmm_panels import plan_panels, spmm_panels
from gossamer.kernels.reference import panels_reference
from tests.kernels.test_cpu_spmm import threads, weights  # noqa: F401
from tests.kernels.test_cpu_targets import ON_X86, child

# Half a unit in the last place of eight bits, and what float32 sums add.
LIMITS = {torch.bfloat16: 2.0**-8, torch.float32: 3e-6}


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(narrow_panels, "GRAIN", 1)


def stored(rows, cols, g, density, seed=0):
    """Random bfloat16 weights whose groups of g rows share their columns."""
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.rand(-(-rows // g), cols, generator=draw) < density).repeat_interleave(g, 0)[:rows]
    return RowGrouped.from_dense(torch.randn(rows, cols, generator=draw).bfloat16(), mask, g=g)


def guarded(*shape, dtype=torch.bfloat16):
    """Panels of NaN with two cache lines of NaN on either side."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 128,), torch.nan, dtype=dtype)
    return whole[64:-64].view(shape), (whole[:64], whole[-64:])


def within(got, fmt, x, bias, activation):
    """The twin's sums, to the rounding of sums of this size."""
    want = panels_reference(fmt, x, bias, activation, torch.float32)
    size = torch.einsum("mk,pkw->pmw", fmt.to_dense().float().abs(), x.float().abs()) + 1
    allowed = LIMITS[got.dtype] * want.abs() + LIMITS[torch.float32] * size
    return bool(((got.float() - want).abs() <= allowed).all())


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 120), st.integers(1, 3), st.integers(1, 150)),
    st.sampled_from((1, 4)),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.sampled_from(("relu", "gelu")),
    st.sampled_from(tuple(LIMITS)),
    st.integers(1, 2),
)
def test_any_shape_matches_the_twin_inside_poison(size, g, density, activation, dtype, workers):
    rows, cols, panels, used = size
    width = -(-used // 32) * 32
    fmt, bias = stored(rows, cols, g, density), torch.randn(rows)
    x, _ = guarded(panels, cols, width)
    x[..., :used] = torch.randn(panels, cols, used)
    y, sides = guarded(panels, rows, width, dtype=dtype)
    plan = plan_panels(
        narrow(fmt), panels=panels, width=width, used=used, activation=activation, out_dtype=dtype, threads=workers
    )
    plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    assert within(y[..., :used], fmt, x[..., :used], bias, activation)
    assert all(bool(side.isnan().all()) for side in sides)
    assert bool(y[..., -(-used // 16) * 16 :].isnan().all())


@pytest.mark.parametrize("g", [1, 2, 4, 8])
@pytest.mark.parametrize("used", [16, 31, 48, 64, 80, 96, 196])
def test_every_tile_width(g, used, threads):  # noqa: F811
    fmt = stored(70, 90, g, 0.3)
    x = torch.randn(2, 90, -(-used // 32) * 32).bfloat16()
    assert within(spmm_panels(narrow(fmt), x, None, "relu", used=used)[..., :used], fmt, x[..., :used], None, "relu")


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu", "relu6", "hard_swish"])
def test_other_activations(activation):
    fmt, bias, x = stored(20, 30, 4, 0.5), torch.randn(20), torch.randn(1, 30, 64).bfloat16()
    assert within(spmm_panels(narrow(fmt), x, bias, activation), fmt, x, bias, activation)


def test_pairs_hold_every_entry_once_and_halves_of_the_odd_ones():
    fmt = stored(20, 50, 4, 0.4)
    weight, again = narrow(fmt), torch.zeros(5, 4, 50)
    for group, (s, e) in enumerate(zip(weight.starts_G, weight.starts_G[1:])):
        for run in range(s, e):
            for lane in range(2):
                again[group, :, int(weight.indices_Rd[run, lane])] += weight.values_Rgd[run, :, lane].float()
    assert torch.equal(again.view(20, 50), fmt.to_dense().float())
    assert torch.equal(weight.starts_G.diff(), (fmt.indptr.diff() + 1) // 2)


def test_rows_in_csr_and_wide_indices():
    fmt = CSR.from_dense(torch.where(torch.rand(9, 70_000) < 1e-3, torch.randn(9, 70_000), 0.0).bfloat16())
    weight, x = narrow(fmt), torch.randn(1, 70_000, 32).bfloat16()
    assert weight.indices_Rd.dtype == torch.int32 and within(spmm_panels(weight, x), fmt, x, None, "none")


@pytest.mark.parametrize("keep", [1, 2])
def test_infinity_and_nan_stay_in_their_lanes_and_keep_their_sign(keep):
    w = torch.zeros(4, 6).bfloat16()
    w[:, :keep] = torch.tensor([1.0, -2.0, 0.5, 3.0]).bfloat16()[:, None]
    x = torch.ones(1, 6, 32).bfloat16()
    x[0, 0, 3], x[0, 0, 7], x[0, 5] = torch.inf, torch.nan, torch.nan
    y = spmm_panels(narrow(RowGrouped.from_dense(w, g=4)), x)[0]
    assert y[:, 3].tolist() == [torch.inf, -torch.inf, torch.inf, torch.inf] and bool(y[:, 7].isnan().all())
    rest = [t for t in range(32) if t not in (3, 7)]
    assert torch.equal(y[:, rest], (keep * w[:, :1]).expand(4, 30))


def test_bfloat16_results_are_rounded_to_nearest_even():
    x = torch.randn(1, 1, 64).bfloat16()
    weight = narrow(CSR.from_dense(torch.ones(1, 1).bfloat16()))
    bias = torch.tensor([2.0**-9])
    assert torch.equal(spmm_panels(weight, x, bias), (x.float() + bias).bfloat16())


def test_same_bits_on_every_run_and_thread_count():
    weight, x, results = narrow(stored(100, 200, 4, 0.2)), torch.randn(2, 200, 96).bfloat16(), []
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        results += [spmm_panels(weight, x, None, "gelu") for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)


def test_one_plan_on_four_python_threads():
    fmt = stored(60, 90, 4, 0.3)
    plan = plan_panels(narrow(fmt), panels=2, width=64, activation="relu", threads=2)

    def run(seed):
        x = torch.randn(2, 90, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
        y = torch.empty(2, 60, 64, dtype=torch.bfloat16)
        for _ in range(50):
            plan.run(x.data_ptr(), y.data_ptr(), 0)
            if not within(y, fmt, x, None, "relu"):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_last_panel_may_be_used_less_and_nothing_is_fine():
    fmt, x = stored(20, 30, 1, 0.5), torch.randn(3, 30, 64).bfloat16()
    y, _ = guarded(3, 20, 64)
    plan_panels(narrow(fmt), panels=3, width=64, used_last=16, threads=1).run(x.data_ptr(), y.data_ptr(), 0)
    assert within(y[:2], fmt, x[:2], None, "none") and within(y[2:, :, :16], fmt, x[2:, :, :16], None, "none")
    assert bool(y[2, :, 16:].isnan().all())
    assert spmm_panels(narrow(fmt), x[:0]).shape == (0, 20, 64)


RUN = """
import torch
from gossamer.formats import RowGrouped
from gossamer.kernels.cpu.narrow import narrow
from gossamer.kernels.cpu.spmm_panels import spmm_panels
from gossamer.kernels.reference import panels_reference
mask = (torch.rand(12, 70) < 0.3).repeat_interleave(4, 0)[:45]
fmt = RowGrouped.from_dense(torch.randn(45, 70).bfloat16(), mask, g=4)
x, bias = torch.randn(2, 70, 128).bfloat16(), torch.randn(45)
for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
    y = spmm_panels(narrow(fmt), x, bias, "relu", out=torch.empty(2, 45, 128, dtype=dtype), used=100)[..., :100]
    want = panels_reference(fmt, x, bias, "relu", torch.float32)[..., :100]
    assert (y.float() - want).abs().max() < limit, dtype
    assert dtype == torch.float32 or float((y - want.bfloat16()).abs().gt(0).float().mean()) < 0.02
"""


@ON_X86
@pytest.mark.parametrize("processor", ["haswell", "nehalem"])
def test_processors_without_the_dot_product_give_the_same_answers(processor, tmp_path):
    child(processor, tmp_path, RUN)


def test_wrong_inputs_are_refused_by_name():
    fmt, x = stored(8, 8, 1, 0.5), torch.randn(2, 8, 32).bfloat16()
    weight = narrow(fmt)
    for call, words in [
        (lambda: narrow(RowGrouped.from_dense(torch.ones(4, 4))), "take bfloat16 weights"),
        (lambda: narrow(RowGrouped.from_dense(torch.ones(3, 4).bfloat16(), g=3)), "by 3"),
        (lambda: spmm_panels(weight, x[:, :7]), "x must be"),
        (lambda: spmm_panels(weight, x.float()), "x must be"),
        (lambda: spmm_panels(weight, x, torch.randn(8).bfloat16()), "bias"),
        (lambda: spmm_panels(weight, x, out=torch.empty(2, 8, 16)), "out must be"),
        (lambda: spmm_panels(weight, x, out=x), "overlaps x"),
        (lambda: spmm_panels(weight, x, residual_PMW=x), "no residual"),
        (lambda: spmm_panels(weight, x, used=33), "used positions"),
        (lambda: spmm_panels(weight, x[..., :16].contiguous()), "multiple of 32"),
        (lambda: plan_panels(weight, panels=1, width=32, out_dtype=torch.float16, threads=1), "write bfloat16 or"),
        (
            lambda: plan_panels(weights(4, 4, 1, 1.0)[0], panels=1, width=32, out_dtype=torch.bfloat16, threads=1),
            "float32 weights write",
        ),
    ]:
        with pytest.raises(FormatError, match=words):
            call()
    with pytest.raises(UnknownName, match="gelu"):
        spmm_panels(weight, x, activation="gulu")
