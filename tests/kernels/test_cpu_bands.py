"""Launches cut into bands: the same bits as whole, whatever the number of threads, and fewer threads than asked for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.formats import RowGrouped
from gossamer.kernels.cpu.conv import dense_stream, plan_conv
from gossamer.kernels.cpu.depthwise import plan_depthwise
from gossamer.kernels.cpu.plane_ops import plan_from_planes, to_planes
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.spmm_panels import aligned_panels, plan_panels
from gossamer.kernels.cpu.window import Window
from gossamer.kernels.lowering import lower
from gossamer.runtime.sequence import NativeSequence, Place, scratch_needed


def chain_of(high, wide, channels, kernel, stride, activation, threads):
    """A first convolution, a product and a depthwise convolution with a residual: launches and their buffers."""
    g = torch.Generator().manual_seed(high * 1000 + wide)
    near = Window((3, 3), (1, 1), (1, 1, 1, 1))
    pad = kernel // 2
    window = Window((kernel, kernel), (stride, stride), (pad, pad, pad, pad))
    out_high, out_wide = window.output(high, wide)
    first = torch.randn(channels, 3, 3, 3, generator=g)
    spread = torch.randn(2 * channels + 3, channels, generator=g)
    spread[torch.rand(spread.shape, generator=g) < 0.5] = 0
    deep = torch.randn(2 * channels + 3, kernel, kernel, generator=g)
    stream = lower(RowGrouped.from_dense(spread, spread != 0, g=4))
    whole = {"threads": threads, "activation": activation}
    launches = [
        plan_conv(dense_stream(first.flatten(1)), 1, high, wide, near, **whole),
        plan_panels(stream, panels=1, width=plane_stride(high * wide), used=high * wide, **whole),
        plan_depthwise(deep, 1, high, wide, window, residual=True, **whole),
    ]
    sizes = [(3, high * wide), (channels, high * wide), (2 * channels + 3, high * wide)]
    sizes += [(2 * channels + 3, out_high * out_wide)] * 2
    buffers = [aligned_panels(1, c, plane_stride(p)).fill_(torch.nan) for c, p in sizes]
    for buffer in (buffers[0], buffers[4]):
        buffer.normal_(generator=g)
    return launches, buffers


def sequence_of(launches, buffers, threads):
    x, a, b, y, r = (t.data_ptr() for t in buffers)
    operands = [(x, a, 0), (a, b, 0), (b, y, 0, r)]
    scratch = torch.full((max(scratch_needed(launch, threads) for launch in launches) // 4 + 32,), torch.nan)
    made = NativeSequence(list(zip(launches, operands)), -(-scratch.data_ptr() // 64) * 64, threads)
    made.kept = scratch, buffers
    return made


@settings(max_examples=25, deadline=None)
@given(
    high=st.integers(1, 40), wide=st.sampled_from([1, 3, 7, 8, 14, 16, 17, 28, 35]), channels=st.integers(1, 9),
    kernel=st.sampled_from([3, 5]), stride=st.sampled_from([1, 2]),
    activation=st.sampled_from(["none", "relu6", "silu"]), workers=st.sampled_from([2, 3, 5]),
)  # fmt: skip
def test_bands_give_the_same_bits_as_one_thread(high, wide, channels, kernel, stride, activation, workers):
    alone = chain_of(high, wide, channels, kernel, stride, activation, 1)
    sequence_of(*alone, 1).run([])
    launches, buffers = chain_of(high, wide, channels, kernel, stride, activation, workers)
    chain = sequence_of(launches, buffers, workers)
    pixels = math.prod(Window((kernel, kernel), (stride, stride), (kernel // 2,) * 4).output(high, wide))
    want = alone[1][3][..., :pixels]
    assert want.isfinite().all()
    for _ in range(3):
        buffers[3].fill_(torch.nan)
        chain.run([])
        assert torch.equal(buffers[3][..., :pixels], want)


@pytest.mark.parametrize("high,wide,kernel,top", [(7, 7, 3, 1), (7, 7, 5, 2), (5, 8, 3, 0), (8, 5, 5, 3)])
def test_many_planes_of_few_pixels(high, wide, kernel, top):
    """Code for one size of image: every band writes its own pixels and nothing else."""
    channels, side = 70, kernel // 2
    window = Window((kernel, kernel), padding=(top, side, side, side))
    pixels = math.prod(window.output(high, wide))
    x, r = torch.randn(1, channels, high, wide), torch.randn(1, channels, *window.output(high, wide))
    weight, bias = torch.randn(channels, kernel, kernel), torch.randn(channels)
    planes, more = to_planes(x), to_planes(r)
    for padded in (planes, more):
        padded[..., (high * wide if padded is planes else pixels) :] = torch.nan
    wide_x = torch.nn.functional.pad(x, (side, side, top, side))
    want = (torch.nn.functional.conv2d(wide_x, weight[:, None], bias, groups=channels) + r).relu().flatten(2)
    launch = plan_depthwise(weight, 1, high, wide, window, activation="relu", residual=True)
    y = torch.full_like(more, torch.nan)
    addresses = planes.data_ptr(), y.data_ptr(), bias.data_ptr(), more.data_ptr()
    launch.run(*addresses)
    torch.testing.assert_close(y[..., :pixels], want, rtol=1e-4, atol=1e-4)
    assert y[..., pixels:].isnan().all()
    whole = y.clone()
    for threads in (2, 3) if launch.bands else ():
        y.fill_(torch.nan)
        for first, last in itertools.pairwise(launch.bands.edges(threads)):
            fixed = launch.bands.part(first, last).fixed
            dataclasses.replace(launch, fixed=struct.pack(f"={len(fixed)}q", *fixed)).run(*addresses)
            assert torch.equal(y[..., :last], whole[..., :last]) and y[..., last:].isnan().all()


def test_every_pixel_is_in_one_band():
    for high, wide in ((7, 7), (14, 14), (1, 40), (56, 3)):
        for launch in chain_of(high, wide, 2, 3, 1, "none", 1)[0]:
            for threads in (1, 2, 3, 8):
                edges = launch.bands.edges(threads)
                assert edges[0] == 0 and edges[-1] == high * wide and edges == sorted(edges)
                assert all(edge % launch.bands.unit == 0 for edge in edges[:-1] if edge < high * wide)
                share = high * wide / threads
                most = max(launch.bands.unit, 0.15 * share)
                assert all(abs(edge - t * share) <= most for t, edge in enumerate(edges[:-1]) if edge < high * wide)


def test_work_for_one_thread_only_wakes_no_other():
    launches, buffers = chain_of(3, 3, 1, 3, 1, "none", 2)
    assert sequence_of(launches, buffers, 2).threads == 1
    launches, buffers = chain_of(64, 64, 8, 3, 1, "none", 2)
    assert sequence_of(launches, buffers, 2).threads == 2


def test_tensors_handed_over_at_the_call_are_shifted_too():
    launches, buffers = chain_of(48, 40, 8, 3, 1, "relu", 2)
    x, a, b, y, r = buffers
    pixels = launches[2].bands.pixels
    result = torch.empty(1, y.shape[1], pixels)
    back = plan_from_planes(1, y.shape[1], pixels, threads=2)
    operands = [(Place(0), a.data_ptr(), 0), (a.data_ptr(), b.data_ptr(), 0), (b.data_ptr(), y.data_ptr(), 0, Place(1))]
    scratch = torch.empty(max(scratch_needed(n, 2) for n in launches) // 4 + 32)
    calls = [*zip(launches, operands), (back, (y.data_ptr(), Place(2)))]
    chain = NativeSequence(calls, -(-scratch.data_ptr() // 64) * 64, 2)
    for _ in range(2):
        image = torch.randn(1, 3, 48, 40)
        moved, other = to_planes(image), torch.randn_like(r)
        chain.run([moved, other, result])
        x.copy_(moved)
        r.copy_(other)
        sequence_of(launches, buffers, 1).run([])
        assert torch.equal(result, y[..., :pixels])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs torch's OpenMP")
def test_fewer_threads_than_asked_for_do_all_the_work():
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]);"
        "from test_cpu_bands import chain_of, sequence_of;"
        "one = chain_of(96, 96, 9, 3, 2, 'relu', 1); sequence_of(*one, 1).run([]);"
        "four = chain_of(96, 96, 9, 3, 2, 'relu', 4); s = sequence_of(*four, 4); assert s.threads == 4;"
        "[s.run([]) for _ in range(20)];"
        "assert torch.equal(four[1][3][..., :2304], one[1][3][..., :2304])"
    )
    here = os.path.dirname(__file__)
    env = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", code, here], env=env, timeout=100, check=True)
