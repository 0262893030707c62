"""The CPU sparse products against float64 torch, on odd shapes, with memory around every buffer poisoned."""

import logging
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from gossamer.core.errors import FormatError, UnknownName
from gossamer.kernels.cpu import plan as product
from gossamer.kernels.cpu.conv import spmm_conv
from gossamer.kernels.cpu.spmm import Panels, empty_panels, spmm, spmm_columns
from gossamer.kernels.cpu.stream import default_block, stream

EXACT = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
    "relu6": functional.relu6,
    "hard_swish": functional.hardswish,
}
ATOL = {torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(product, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def weights(rows, cols, g, density, *, dtype=torch.uint16, block=None, seed=0):
    """A random grouped stream and the dense [rows, cols] matrix that it stores."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-rows // g)
    mask = torch.rand(groups, cols, generator=draw) < density
    group_E, column_E = mask.nonzero(as_tuple=True)
    w = torch.zeros(groups, g, cols)
    w[group_E, :, column_E] = torch.randn(len(group_E), g, generator=draw)
    w = w.reshape(groups * g, cols)
    w[rows:] = 0
    values = w.reshape(groups, g, cols)[group_E, :, column_E].contiguous()
    indptr = torch.zeros(groups + 1, dtype=torch.int32)
    indptr[1:] = mask.sum(1).cumsum(0)
    return stream(g, rows, cols, indptr, column_E.to(dtype), values, block=block), w[:rows].contiguous()


def poisoned(*shape):
    """A contiguous tensor inside a larger one of NaN, and the surroundings, to be checked afterwards."""
    count, margin = torch.Size(shape).numel(), 67
    whole = torch.full((count + 2 * margin,), torch.nan)
    return whole[margin : margin + count].view(shape), (whole[:margin], whole[margin + count :])


def untouched(surroundings):
    return all(bool(side.isnan().all()) for side in surroundings)


def close(got, x, w, bias, activation="none"):
    """Within float32 rounding of the exact sum, measured against the sum of magnitudes."""
    exact = EXACT[activation](x.double() @ w.double().T + bias.double())
    size = x.double().abs() @ w.double().abs().T + bias.double().abs() + 1
    error = (got.double() - exact).abs() / size
    assert error.numel() == 0 or float(error.max()) < ATOL[torch.float32]


shapes = st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(0, 150))


@settings(max_examples=60, deadline=None)
@given(
    shapes,
    st.sampled_from((1, 2, 4, 8)),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.sampled_from((None, 1, 37, 1000)),
    st.booleans(),
)
def test_any_shape_matches_float64_inside_poison(shape, g, density, block, wide):
    rows, cols, tokens = shape
    weight, w = weights(rows, cols, g, density, block=block, dtype=torch.int32 if wide else torch.uint16)
    x, around_x = poisoned(tokens, cols)
    y, around_y = poisoned(tokens, rows)
    x.copy_(torch.randn(tokens, cols))
    bias, around_bias = poisoned(rows)
    bias.copy_(torch.randn(rows))
    assert spmm(weight, x, bias, "relu", y) is y
    close(y, x, w, bias, "relu")
    assert untouched(around_x) and untouched(around_y) and untouched(around_bias)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from((1, 2, 4, 8)), st.sampled_from((None, 37)), st.integers(1, 3))
def test_columns_match_float64_inside_poison(shape, g, block, images):
    rows, cols, count = shape
    weight, w = weights(rows, cols, g, 0.2, block=block)
    x, around_x = poisoned(images, cols, count)
    y, around_y = poisoned(images, rows, count)
    x.copy_(torch.randn(images, cols, count))
    bias = torch.randn(rows)
    spmm_columns(weight, x, bias, out=y)
    close(y.transpose(1, 2).reshape(-1, rows), x.transpose(1, 2).reshape(-1, cols), w, bias)
    assert untouched(around_x) and untouched(around_y)


@pytest.mark.parametrize("g", [1, 2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 9, 16, 17, 33, 48, 64, 65, 100, 196, 257])
def test_every_panel_width(g, tokens, threads):
    weight, w = weights(52, 90, g, 0.3)
    x, bias = torch.randn(tokens, 90), torch.randn(52)
    close(spmm(weight, x, bias), x, w, bias)


@pytest.mark.parametrize("activation", list(EXACT))
@pytest.mark.parametrize("tokens", [1, 7, 40, 130])
@pytest.mark.parametrize("columns", [False, True])
def test_activations_and_missing_bias(activation, tokens, columns, threads):
    weight, w = weights(37, 64, 4, 0.4)
    x = torch.randn(tokens, 64)
    y = spmm_columns(weight, x.T.contiguous(), None, activation).T if columns else spmm(weight, x, None, activation)
    close(y, x, w, torch.zeros(37), activation)


@pytest.mark.parametrize(
    "activation, bound", [("gelu", 2e-6), ("gelu_tanh", 2e-6), ("silu", 2e-6), ("hard_swish", 2e-6)]
)
def test_activation_error_over_its_whole_range(activation, bound):
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor([-1e4, -100.0, -0.0, 1e-30, 100.0, 1e4])])
    one = stream(1, 1, 1, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32), torch.ones(1))
    y = spmm_columns(one, x[None], None, activation)[0]
    assert float((y.double() - EXACT[activation](x.double())).abs().max()) <= bound


@pytest.mark.parametrize("activation", list(EXACT))
def test_nan_and_infinity_reach_exactly_their_own_tokens(activation):
    weight, _ = weights(20, 30, 4, 1.0)
    x = torch.randn(50, 30)
    x[3, 4], x[40, 5] = torch.nan, torch.inf
    y = spmm(weight, x, None, activation)
    assert bool(y[3].isnan().all())
    clean = [t for t in range(50) if t not in (3, 40)]
    assert bool(y[clean].isfinite().all()) and bool(y[40].isfinite().all()) == (activation == "relu6")


@pytest.mark.parametrize("g", [1, 4, 8])
@pytest.mark.parametrize("tokens", [1, 64, 100, 200])
def test_panels_between_layers_equal_rows(g, tokens, threads):
    first, w1 = weights(70, 40, g, 0.3)
    second, w2 = weights(33, 70, g, 0.3, seed=1)
    x, bias = torch.randn(tokens, 40), torch.randn(70)
    hidden = spmm(first, x, bias, "relu", empty_panels(tokens, 70))
    assert isinstance(hidden, Panels)
    close(hidden.rows(), x, w1, bias, "relu")
    y = spmm(second, hidden, out=torch.empty(tokens, 33))
    close(y, hidden.rows(), w2, torch.zeros(33))
    assert torch.equal(spmm(second, hidden).rows(), y)


@pytest.mark.parametrize("g", [1, 4, 8])
@pytest.mark.parametrize("count", [1, 64, 100, 196])
def test_columns_through_panels(g, count, threads):
    first, w1 = weights(70, 40, g, 0.3)
    second, w2 = weights(33, 70, g, 0.3, seed=1)
    x, bias = torch.randn(40, count), torch.randn(70)
    hidden = spmm_columns(first, x, bias, "gelu", empty_panels(count, 70))
    close(hidden.rows(), x.T, w1, bias, "gelu")
    y, around = poisoned(33, count)
    assert spmm_columns(second, hidden, out=y) is y and untouched(around)
    close(y.T, hidden.rows(), w2, torch.zeros(33))
    with pytest.raises(FormatError, match="x must be"):
        spmm_columns(first, hidden)


@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("kernel, padding", [((3, 3), (1, 1)), ((3, 3), (0, 0)), ((1, 5), (0, 2)), ((5, 3), (2, 0))])
@pytest.mark.parametrize("high, wide", [(5, 7), (28, 28), (9, 33)])
def test_convolution_matches_torch(g, kernel, padding, high, wide, threads):
    weight, w = weights(22, 6 * kernel[0] * kernel[1], g, 0.3, block=20 * (g == 1) or None)
    x, around = poisoned(2, 6, high, wide)
    x.copy_(torch.randn(2, 6, high, wide))
    bias = torch.randn(22)
    exact = functional.conv2d(x.double(), w.double().view(22, 6, *kernel), bias.double(), padding=padding)
    y, around_y = poisoned(*exact.shape)
    spmm_conv(weight, x, kernel, padding, bias, out=y)
    assert float((y.double() - exact).abs().max()) < 1e-4
    assert untouched(around) and untouched(around_y)


@pytest.mark.parametrize("g", [1, 4])
def test_same_bits_on_every_run_and_thread_count(g):
    weight, _ = weights(100, 200, g, 0.2)
    x, results = torch.randn(150, 200), []
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        results += [spmm(weight, x, None, "gelu") for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)


def test_four_python_threads_at_once():
    torch.set_num_threads(2)
    work = []
    for seed in range(4):
        weight, _ = weights(60 + seed, 90, 4 if seed % 2 else 1, 0.3, seed=seed)
        x = torch.randn(30 + 40 * seed, 90)
        work.append((weight, x, spmm(weight, x)))

    def run(item):
        weight, x, expected = item
        return all(torch.equal(spmm(weight, x), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, work))


def test_small_work_stays_on_the_calling_thread(monkeypatch):
    weight, _ = weights(64, 64, 1, 0.5)
    monkeypatch.setattr(product, "GRAIN", 10**9)
    torch.set_num_threads(2)
    spmm(weight, torch.randn(8, 64))
    assert [plan.threads for plan in weight.plans.values()] == [1]


def test_torch_defaults_do_not_reach_the_kernels():
    weight, w = weights(40, 60, 1, 0.3)
    x = torch.randn(200, 60)
    torch.set_default_dtype(torch.float64)
    try:
        y, panels = spmm(weight, x), spmm(weight, x, out=empty_panels(200, 40))
    finally:
        torch.set_default_dtype(torch.float32)
    assert y.dtype is torch.float32 and panels.data.dtype is torch.float32
    close(y, x, w, torch.zeros(40))


def test_zero_sizes():
    weight, _ = weights(5, 8, 1, 0.5)
    assert spmm(weight, torch.empty(0, 8)).shape == (0, 5)
    assert spmm_columns(weight, torch.empty(8, 0)).shape == (5, 0)
    empty = stream(4, 6, 0, torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.uint16), torch.zeros(0, 4))
    bias = torch.arange(6.0)
    assert torch.equal(spmm(empty, torch.empty(3, 0), bias), bias.expand(3, 6))
    none = stream(1, 0, 8, torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.uint16), torch.zeros(0, 1))
    assert spmm(none, torch.randn(3, 8)).shape == (3, 0)


def test_copies_and_moved_memory_read_their_own_weights():
    weight, w = weights(40, 60, 4, 0.3)
    x = torch.randn(20, 60)
    expected = spmm(weight, x)
    copy = deepcopy(weight)
    weight.values_EG.zero_()
    assert torch.equal(spmm(copy, x), expected) and not spmm(weight, x).any()
    copy.values_EG.share_memory_()
    copy.values_EG.mul_(2)
    close(spmm(copy, x), x, 2 * w, torch.zeros(40))


def test_stream_shares_memory_and_cuts_blocks():
    indptr, column = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([0, 5, 9, 5], dtype=torch.uint16)
    values = torch.arange(4.0)[:, None]
    cut = stream(1, 2, 10, indptr, column, values, block=5)
    assert cut.starts_BG.tolist() == [[0, 3], [1, 3], [3, 4]]
    assert cut.values_EG.data_ptr() == values.data_ptr() and cut.indices_E.data_ptr() == column.data_ptr()
    assert default_block(4, 1500, 0.1) == 1500 and default_block(1, 1536, 0.3) == 128
    assert default_block(1, 4000, 0.02) == 1000 and default_block(8, 5000, 0.1) < 2048


@pytest.mark.parametrize(
    "change, words",
    [
        ({"g": 3}, "rows per group"),
        ({"indices": torch.tensor([1, 8, 0], dtype=torch.int32)}, "0..7"),
        ({"indices": torch.tensor([1, 2, 3])}, "uint16 or int32"),
        ({"values": torch.ones(3, 1, dtype=torch.bfloat16)}, "float32"),
        ({"indptr": torch.tensor([0, 2, 1], dtype=torch.int32)}, "rise"),
        ({"indices": torch.tensor([4, 1, 0], dtype=torch.int32), "block": 3}, "rise within"),
        ({"rows": 9}, "indptr"),
    ],
)
def test_damaged_streams_are_refused(change, words):
    good = {
        "g": 1, "rows": 2, "cols": 8, "indptr": torch.tensor([0, 2, 3], dtype=torch.int32),
        "indices": torch.tensor([1, 3, 0], dtype=torch.int32), "values": torch.ones(3, 1), "block": None,
    }  # fmt: skip
    parts = good | change
    with pytest.raises(FormatError, match=words):
        stream(*(parts[k] for k in ("g", "rows", "cols", "indptr", "indices", "values")), block=parts["block"])


def test_wrong_inputs_are_refused_by_name():
    weight, _ = weights(5, 8, 1, 0.5)
    for bad in (torch.randn(3, 7), torch.randn(3, 8).double(), torch.randn(8, 3).T, torch.randn(8)):
        with pytest.raises(FormatError, match="x must be"):
            spmm(weight, bad)
    with pytest.raises(FormatError, match="bias"):
        spmm(weight, torch.randn(3, 8), torch.randn(4))
    with pytest.raises(FormatError, match="out"):
        spmm(weight, torch.randn(3, 8), out=torch.empty(3, 6))
    with pytest.raises(UnknownName, match="gelu"):
        spmm(weight, torch.randn(3, 8), activation="gulu")


SECOND = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from gossamer.kernels.cpu.plan import kernel_for
kernel_for(1, 2), kernel_for(1, 4)
"""


def test_compiled_kernels_come_from_disk_in_a_second_process(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path))
    runs = [
        subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0].count("compiling") == 2 and "compiling" not in runs[1]


OLDER = """
import torch
from gossamer.kernels.cpu import plan, spmm, stream, target
w = torch.randn(45, 70) * (torch.rand(45, 70) < 0.3)
row, column = w.nonzero(as_tuple=True)
starts = torch.zeros(46, dtype=torch.int32)
starts[1:] = torch.bincount(row, minlength=45).cumsum(0)
weight = stream.stream(1, 45, 70, starts, column.to(torch.uint16), w[row, column])
for tokens in (1, 7, 50):
    for activation in ("relu", "gelu", "silu"):
        exact = getattr(torch.nn.functional, activation)
        x = torch.randn(tokens, 70)
        error = (spmm.spmm(weight, x, None, activation) - exact(x.double() @ w.double().T)).abs().max()
        assert error < 2e-5, (tokens, activation, error)
assembly = plan.kernel_for(1, 2).kernel._library.get_asm_str()
print(target.lanes(), "zmm" in assembly, "ymm" in assembly)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
@pytest.mark.parametrize("processor, said", [("haswell", "8 False True"), ("nehalem", "4 False False")])
def test_older_processors_get_code_that_they_can_run(processor, said, tmp_path):
    # A cache of its own: Numba shows no assembly of what it read from disk.
    older = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "GOSSAMER_CACHE_DIR": str(tmp_path)}
    child = subprocess.run([sys.executable, "-c", OLDER], env=older, capture_output=True, text=True)
    assert child.returncode == 0 and child.stdout.split("\n")[0] == said, child.stderr[-2000:] + child.stdout


def test_import_does_not_load_numba():
    code = "import sys, gossamer.kernels.cpu.spmm; raise SystemExit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_falls_back_to_python_threads_without_openmp(monkeypatch):
    from gossamer.kernels.cpu import threads as pools

    weight, _ = weights(64, 80, 4, 0.3)
    x = torch.randn(300, 80)
    expected = spmm(weight, x)
    entry = product.kernel_for(4, 2)
    monkeypatch.setattr(entry, "_parallel", None)
    torch.set_num_threads(2)
    assert pools.runner_name() and torch.equal(spmm(weight, x), expected)


def test_compiling_is_announced(tmp_path, monkeypatch, caplog):
    from gossamer.kernels.cpu import cache

    with caplog.at_level(logging.INFO, logger="gossamer"):
        cache.announce("sparse product")
    assert "sparse product" in caplog.text and str(cache.kernel_dir()) in caplog.text
