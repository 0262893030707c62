"""Convolutions of volumes: against float64 torch on odd sizes inside poison, as layers, packed, saved and compiled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv3d, pad

import gossamer
from gossamer.core.errors import FormatError
from gossamer.deploy import report_of
from gossamer.deploy.convolutions import pixels
from gossamer.formats import CSR, Dense, KernelPatterns, RowGrouped
from gossamer.kernels.cpu import conv_plan
from gossamer.kernels.cpu.conv3d import sparse_conv3d
from gossamer.kernels.cpu.window import Depth, Window
from gossamer.kernels.lowering import lower
from gossamer.nn import PackedConv2d
from tests.kernels.test_cpu_conv import close, poisoned, threads, weights  # noqa: F401


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(conv_plan, "GRAIN", 1)


def exact(x, w, window, depth, bias, groups):
    top, left, bottom, right = window.padding
    x = pad(x.double(), (left, right, top, bottom, depth.front, depth.back))
    w = w.double().view(w.shape[0], -1, depth.kernel, *window.kernel)
    steps, apart = (depth.stride, *window.stride), (depth.dilation, *window.dilation)
    return conv3d(x, w, None if bias is None else bias.double(), steps, 0, apart, groups)


windows = st.builds(
    Window, st.sampled_from(((1, 1), (3, 3), (2, 4))), st.sampled_from(((1, 1), (2, 2), (1, 3))),
    st.tuples(*[st.integers(0, 2)] * 4), st.sampled_from(((1, 1), (2, 1))),
)  # fmt: skip
depths = st.builds(
    Depth, st.sampled_from((1, 2, 3, 5)), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.integers(1, 2)
)


@settings(max_examples=80, deadline=None)
@given(
    windows, depths, st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 35)), st.sampled_from((1, 2, 4)),
    st.sampled_from((0.0, 0.3, 1.0)), st.sampled_from((1, 1, 2)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_volume_matches_float64_inside_poison(window, depth, size, g, density, groups, runs, batched):
    try:
        out = (depth.output(size[0]), *window.output(*size[1:]))
    except FormatError:
        return
    rows = 8 * groups
    weight, w = weights(rows, 3 * depth.kernel * window.taps, g, density)
    if runs and g == 1:
        weight = lower(KernelPatterns.from_dense(w, taps=1))
    x, around = poisoned(*(2,) * batched, 3 * groups, *size)
    x.copy_(torch.randn(x.shape))
    bias = torch.randn(rows)
    y = sparse_conv3d(weight, x, window, depth, bias, "relu", groups=groups)
    assert tuple(y.shape[-3:]) == out
    close(y, exact(x, w, window, depth, bias, groups).relu())
    assert all(bool(side.isnan().all()) for side in around)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_both_thread_counts_and_no_bias(activation, threads):  # noqa: F811
    weight, w = weights(13, 27 * 5, 1, 0.3)
    x = torch.randn(2, 5, 7, 14, 14)
    y = sparse_conv3d(weight, x, Window((3, 3), padding=(1,) * 4), Depth(3, 1, 1, 1), None, activation)
    want = exact(x, w, Window((3, 3), padding=(1,) * 4), Depth(3, 1, 1, 1), None, 1)
    close(y, nn.functional.gelu(want) if activation == "gelu" else want)


def test_what_does_not_fit_is_refused():
    weight, _ = weights(8, 27 * 4, 1, 0.5)
    window, depth = Window((3, 3)), Depth(3)
    for x in (torch.zeros(5, 3, 3, 3), torch.zeros(4, 9, 9), torch.zeros(4, 3, 3, 3).double()):
        with pytest.raises(FormatError, match="x must be"):
            sparse_conv3d(weight, x, window, depth)
    with pytest.raises(FormatError, match="does not fit into a volume of 2 slices"):
        sparse_conv3d(weight, torch.zeros(4, 2, 9, 9), window, depth)
    with pytest.raises(FormatError, match="no multiple of 5"):
        sparse_conv3d(weight, torch.zeros(4, 9, 9, 9), window, Depth(5))
    with pytest.raises(FormatError, match="at least 1"):
        Depth(0)


LAYERS = {
    "same": lambda: nn.Conv3d(4, 8, 3, padding=1),
    "uneven": lambda: nn.Conv3d(4, 8, (1, 3, 2), stride=(2, 1, 3), padding=(0, 2, 1), dilation=(1, 2, 1), bias=False),
    "named same": lambda: nn.Conv3d(4, 8, (2, 3, 4), padding="same"),
    "valid": lambda: nn.Conv3d(4, 8, (3, 2, 1), padding="valid"),
    "grouped": lambda: nn.Conv3d(4, 8, 3, padding=1, groups=2),
    "strided pixels": lambda: nn.Conv3d(4, 8, 1, stride=(2, 1, 1)),
    "pixels": lambda: nn.Conv3d(4, 8, 1),
}


def pruned(name):
    torch.manual_seed(0)
    conv = LAYERS[name]()
    kept = (torch.rand(2, *conv.weight.shape[1:]) < 0.5).repeat_interleave(4, 0)
    conv.weight.data.masked_fill_(~kept, 0)
    return conv


@pytest.mark.parametrize("fmt", [CSR, RowGrouped, Dense])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_and_without_gradients(name, fmt):
    conv = pruned(name)
    packed = PackedConv2d.from_conv(conv, fmt)
    x = torch.randn(2, 4, 6, 7, 19)
    with torch.no_grad():
        want = conv(x)
        for given_x in (x, x.to(memory_format=torch.channels_last_3d)):
            torch.testing.assert_close(packed(given_x), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed(x[0]), want[0], atol=1e-5, rtol=1e-5)
        assert packed(x[:0]).shape == want[:0].shape and pixels(conv, tuple(x.shape)) * 8 == want.numel()
    torch.testing.assert_close(packed(x.clone().requires_grad_()), want, atol=1e-5, rtol=1e-5)
    back = packed.unpack()
    assert (
        repr(back) == repr(conv) and torch.equal(back.weight, conv.weight) and torch.equal(packed.weight, conv.weight)
    )
    with pytest.raises(FormatError, match="volumes"):
        packed(torch.zeros(2, 3, 6, 7, 19))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(2, 8, 3, padding=1), nn.Conv3d(8, 4, (3, 1, 3), stride=2, dilation=(1, 1, 2))

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_pruned_packed_saved_unpacked_and_compiled(tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 2, 6, 9, 15)
    gossamer.prune(model, "magnitude", density=0.3, targets=("a", "b"))
    packed = gossamer.pack(model, x, candidates=["csr/cpu"], repeats=1)
    assert report_of(packed).counts() == {"csr/cpu": 2}
    assert report_of(packed).layers[0].kind == "conv 3x3x3 on 2x2x6x9x15"
    loaded = gossamer.load(gossamer.save(packed, tmp_path / "m"), model=Net())
    back = gossamer.unpack(packed)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(packed(x), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(x), packed(x)) and torch.equal(back(x), want)
        torch.testing.assert_close(gossamer.compile(model, x)(x), want, rtol=1e-4, atol=1e-5)


def test_patterns_of_slices_pack_too():
    torch.manual_seed(0)
    model = nn.Conv3d(8, 16, 3, padding=1).eval()
    gossamer.prune(model, "kernel_patterns", density=0.2, taps=6, patterns=4, targets=("",))
    x = torch.randn(1, 8, 5, 16, 16)
    packed = gossamer.pack(model, x, candidates=["kernelpatterns/cpu"], repeats=1)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-5)
