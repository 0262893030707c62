"""Kernel patterns: stored and refused, convolved by runs of taps against float64, found by packing and compiling."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from struct import pack as packed_numbers

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.core.errors import FormatError
from gossamer.deploy import report_of
from gossamer.deploy.structure import detect
from gossamer.formats import CSR, KernelPatterns, format_from
from gossamer.kernels.cpu import conv_plan, runs_kernel
from gossamer.kernels.cpu.conv import plan_conv, sparse_conv
from gossamer.kernels.cpu.conv_choice import Tuning
from gossamer.kernels.cpu.conv_plan import run_on
from gossamer.kernels.cpu.window import Window
from gossamer.kernels.lowering import lower
from gossamer.nn import PackedConv2d
from gossamer.runtime.weights import Weights
from tests.kernels.test_cpu_conv import ACTIVATIONS, SAME, close, exact, poisoned, threads  # noqa: F401


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(conv_plan, "GRAIN", 1)


def patterned(rows, channels, kernel, kinds, density=0.6, seed=0):
    """A weight [rows, channels * taps] whose kernels keep one of a few sets of taps, or nothing."""
    draw = torch.Generator().manual_seed(seed)
    taps = kernel[0] * kernel[1]
    sets = torch.rand(kinds, taps, generator=draw) < 0.5
    sets[:, 0] |= ~sets.any(1)
    kept = torch.rand(rows, channels, generator=draw) < density
    mask = sets[torch.randint(kinds, (rows, channels), generator=draw)] & kept[..., None]
    return torch.where(mask, torch.randn(rows, channels, taps, generator=draw), 0.0).flatten(1)


def stored(w, kernel):
    return lower(KernelPatterns.from_dense(w, taps=kernel[0] * kernel[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,channels,kernel", [(7, 5, (3, 3)), (3, 1, (1, 4)), (0, 4, (2, 2)), (4, 0, (3, 3))])
def test_round_trip(rows, channels, kernel, dtype):
    w = patterned(rows, channels, kernel, 3)
    if w.numel():
        w[0, 0], w[-1, -1] = torch.nan, -0.0
    w = w.to(dtype)
    fmt = KernelPatterns.from_dense(w, taps=kernel[0] * kernel[1])
    again = format_from(json.loads(json.dumps(fmt.meta())), fmt.parts())
    for one in (fmt, again):
        assert torch.equal(one.to_dense().view(torch.int16), w.view(torch.int16))
    assert fmt.nnz == fmt.gather(w).numel() and len(fmt.patterns) <= 5
    explicit = KernelPatterns.from_dense(torch.zeros(2, 4), torch.eye(2, 4).bool(), taps=2)
    assert explicit.stored == 2 and explicit.channels.tolist() == [0, 0]


def test_smaller_than_single_entries():
    w = patterned(32, 32, (3, 3), 8)
    fmt = KernelPatterns.from_dense(w)
    kernels = int((w.view(-1, 9) != 0).any(1).sum())
    assert fmt.nbytes == 4 * 33 + 3 * kernels + 9 * 8 + 4 * fmt.nnz < CSR.from_dense(w).nbytes


def test_what_does_not_fit_is_refused():
    with pytest.raises(FormatError, match="multiple of 9 columns"):
        KernelPatterns.from_dense(torch.ones(2, 10))
    codes = torch.arange(1, 300)[:, None] >> torch.arange(9) & 1
    with pytest.raises(FormatError, match="299 different sets of taps"):
        KernelPatterns.from_dense(codes.float())


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("kinds", lambda t: t + 200, "below"),
        ("patterns", torch.zeros_like, "at least one tap"),
        ("patterns", torch.ones_like, "values must be"),
        ("channels", lambda t: t.int().add(90).to(torch.uint16), "column indices"),
        ("channels", lambda t: t.int(), "channels must be"),
        ("indptr", lambda t: t + 1, "rise"),
        ("values", lambda t: t[:-1], "values must be"),
        ("values", torch.Tensor.int, "values must be float"),
    ],
)
def test_damaged_parts_are_refused(part, change, words):
    fmt = KernelPatterns.from_dense(patterned(6, 5, (3, 3), 3))
    parts = {**fmt.parts(), part: change(fmt.parts()[part])}
    with pytest.raises(FormatError, match=words):
        format_from(fmt.meta(), parts)


@pytest.mark.parametrize("beyond", [65536, -65536])
def test_wide_channels_beyond_the_matrix_are_refused(beyond):
    """Columns of 32 bits, channels that would fit 16: numbers 2¹⁶ off must not pass for good ones."""
    w = torch.zeros(1, 8000 * 9)
    w[0, :90] = 1.0
    fmt = KernelPatterns.from_dense(w)
    off = torch.zeros(10, dtype=torch.int32)
    off[-1 if beyond > 0 else 0] = beyond
    with pytest.raises(FormatError, match="column indices"):
        format_from(fmt.meta(), {**fmt.parts(), "channels": fmt.channels + off})


windows = st.builds(
    Window,
    st.sampled_from(((3, 3), (3, 3), (5, 5), (1, 3), (4, 2), (7, 1))),
    st.sampled_from(((1, 1), (1, 1), (2, 2), (3, 1), (1, 3))),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.sampled_from(((1, 1), (1, 1), (2, 2), (3, 1))),
)


@settings(max_examples=120, deadline=None)
@given(
    window=windows, size=st.tuples(st.integers(1, 40), st.integers(6, 70)), kinds=st.sampled_from((1, 3, 40)),
    density=st.sampled_from((0.0, 0.3, 1.0)), groups=st.sampled_from((1, 1, 2)), added=st.booleans(),
    block=st.sampled_from((None, 1, 2)), panel=st.sampled_from((None, 1, 5)), images=st.sampled_from((1, 2)),
)  # fmt: skip
def test_any_window_matches_float64_inside_poison(window, size, kinds, density, groups, added, block, panel, images):
    try:
        out = window.output(*size)
    except FormatError:
        return
    rows, channels = 6 * groups, 5 * groups
    w = patterned(rows, 5, window.kernel, kinds, density)
    (x, around_x), (y, around_y) = poisoned(images, channels, *size), poisoned(images, rows, *out)
    x.copy_(torch.randn(x.shape))
    bias, residual = torch.randn(rows), torch.randn(y.shape) if added else None
    plan = plan_conv(
        stored(w, window.kernel), images, *size, window, groups=groups, activation="relu6", residual=added, threads=2,
        strides=(size[0] * size[1], out[0] * out[1]), tuning=Tuning(block=block, panel=panel),
    )  # fmt: skip
    wasted = -(-out[1] // runs_kernel.LANES) * runs_kernel.LANES / out[1]
    assert (plan.entry is runs_kernel.kernel(int(added))) == (wasted < 2)
    want = (exact(x, w, window, bias, groups) + (residual.double() if added else 0)).clamp(0, 6)
    run_on(plan, x, y, bias, residual)
    close(y, want)
    edges = dict.fromkeys(plan.bands.edges(3)) if plan.bands else ()
    for first, last in pairwise(edges):
        y.fill_(torch.nan)
        part = plan.bands.part(first, last)
        addresses = [t.data_ptr() for t in (x, y, bias) + ((residual,) if added else ())]
        alone = replace(plan, fixed=packed_numbers(f"={len(part.fixed)}q", *part.fixed))
        alone.run(*(address + shift for address, shift in zip(addresses, part.shifts)))
        got = y.flatten(2)
        close(got[..., first:last], want.flatten(2)[..., first:last])
        assert bool(got[..., :first].isnan().all()) and bool(got[..., last:].isnan().all())
    assert all(bool(side.isnan().all()) for side in (*around_x, *around_y))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_on_sizes_of_networks(activation, threads):  # noqa: F811
    w = patterned(33, 20, (3, 3), 8)
    x = torch.randn(20, 28, 28)
    close(
        sparse_conv(stored(w, (3, 3)), x, SAME, None, activation), ACTIVATIONS[activation](exact(x[None], w, SAME)[0])
    )


def test_runs_of_one_kernel_are_found():
    from gossamer.kernels.cpu.conv_columns import Columns
    from gossamer.kernels.cpu.conv_entries import run_entries

    taps = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]])  # columns of three, of two apart, of two
    lines = Columns(SAME, 14, 14, 1, 14, 16)
    records, starts = run_entries(stored(taps.float().view(1, 9), (3, 3)), SAME, 1, lines, 1)
    assert starts.flatten().tolist() == [0, 4, 7, 11]
    assert records[1:4].tolist() == [0, 4 * 2, 4 * 4] and records[5:7].tolist() == [4 * 3, 4 * 6]
    assert records[8] == 4 * 1 and records[10] == 4 * 5
    assert (records[[0, 4, 7, 9]] == 4 * torch.from_numpy(lines.taps())[[0, 5, 1, 7]]).all()


def test_results_do_not_depend_on_threads_or_callers():
    weight, x = stored(patterned(64, 20, (3, 3), 8), (3, 3)), torch.randn(2, 20, 30, 31)
    before, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(sparse_conv(weight, x, SAME))
        with ThreadPoolExecutor(3) as pool:
            results += list(pool.map(lambda _: sparse_conv(weight, x, SAME), range(6)))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_values_are_read_where_they_are():
    packed = PackedConv2d.from_conv(network()[0], KernelPatterns)
    x = torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        packed.linear.bias.zero_()
        first = packed(x)
        packed.linear.values.mul_(2)
        torch.testing.assert_close(packed(x), 2 * first)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, stride=2, padding=1))
    for conv in (net[0], net[2]):
        conv.weight.data = patterned(conv.out_channels, conv.in_channels, (3, 3), 4).view_as(conv.weight)
    return net.eval()


def test_structure_is_found_where_patterns_are_few():
    w = patterned(24, 24, (3, 3), 4)
    assert [(s.name, s.format, s.options) for s in detect(w, 9)] == [
        ("kernels of 4 patterns", "kernelpatterns", (("taps", 9),))
    ]
    whole = torch.where(torch.rand(24, 24, 1) < 0.3, torch.randn(24, 24, 9), 0.0).flatten(1)
    assert detect(whole, 9)[-1].name == "kernels of one pattern"
    assert detect(w) == () and detect(torch.where(torch.rand(24, 216) < 0.5, w.abs() + 1, 0.0), 9) == ()
    single = torch.eye(9)[torch.randint(9, (24, 24))].flatten(1)
    assert detect(single, 9) == ()


def test_packed_saved_unpacked_and_compiled(tmp_path, monkeypatch):
    net, x = network(), torch.randn(2, 8, 30, 33)
    packed = gossamer.pack(net, x, candidates=["kernelpatterns/cpu"], repeats=1)
    tried = gossamer.pack(net, x, repeats=1)
    assert all("kernelpatterns(taps=9)/cpu" in {t.candidate for t in r.trials} for r in report_of(tried).layers)
    loaded = gossamer.load(gossamer.save(packed, tmp_path / "m"), model=network())
    back = gossamer.unpack(packed)
    monkeypatch.setattr(Weights, "fastest", lambda self, *measured: self.form("kernelpatterns(taps=9)"))
    with torch.no_grad():
        want = net(x)
        torch.testing.assert_close(packed(x), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(x), packed(x)) and torch.equal(back(x), want)
        fast = gossamer.compile(net, x)
        torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-5)
        assert fast.explain(x).count("kernelpatterns(taps=9)") == 2
