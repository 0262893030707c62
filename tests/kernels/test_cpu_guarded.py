"""Kernels read and write nothing but what they were given: every buffer ends, or starts, at an unreadable page.

A stray access kills the process, so the products run in a child: this file run as a script.
"""

import ctypes
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d

PAGE, READ_WRITE, NO_ACCESS, PRIVATE_ANONYMOUS = (
    os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096,
    3,
    0,
    0x22,
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages with Linux's mmap and mprotect")
def test_nothing_beyond_any_buffer_is_touched():
    root = str(Path(__file__).parents[2])
    child = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert child.returncode == 0, f"exit code {child.returncode} (a negative one is a signal): {child.stderr[-2000:]}"


def libc():
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def guarded(tensor, at_end):
    """A copy whose last (or first) byte touches an unreadable page; never unmapped, the child is short-lived."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    room = -(-size // PAGE) * PAGE
    base = libc().mmap(None, room + 2 * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0)
    for page in (base, base + PAGE + room):
        libc().mprotect(page, PAGE, NO_ACCESS)
    memory = (ctypes.c_uint8 * size).from_address(base + PAGE + (room - size if at_end else 0))
    return torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def stream_of(rows, cols, g, density, at_end):
    from gossamer.kernels.cpu.stream import Stream, stream

    groups = -(-rows // g)
    w = torch.randn(groups, g, cols) * (torch.rand(groups, 1, cols) < density)
    w.view(-1, cols)[rows:] = 0
    group_E, column_E = (w != 0).any(1).nonzero(as_tuple=True)
    indptr = torch.zeros(groups + 1, dtype=torch.int32)
    indptr[1:] = torch.bincount(group_E, minlength=groups).cumsum(0)
    made = stream(g, rows, cols, indptr, column_E.to(torch.uint16), w[group_E, :, column_E].contiguous(), block=37)
    parts = (guarded(part, at_end) for part in (made.starts_BG, made.indices_E, made.values_EG))
    return Stream(g, rows, cols, made.block, *parts), w.view(-1, cols)[:rows]


def one_round(at_end):
    from gossamer.formats import Bitmask, TileBitmask
    from gossamer.kernels.cpu import target
    from gossamer.kernels.cpu.conv import spmm_conv
    from gossamer.kernels.cpu.decode import bitmask_matvec
    from gossamer.kernels.cpu.depthwise import depthwise
    from gossamer.kernels.cpu.spmm import spmm, spmm_columns
    from gossamer.kernels.cpu.tiledecode import TileProduct
    from gossamer.kernels.cpu.window import Window

    g, rows, tokens = random.choice((1, 2, 4, 8)), random.randint(1, 150), random.choice((1, 2, 5, 16, 31, 70, 200))
    channels, kernel = random.randint(1, 9), (random.choice((1, 3)), random.choice((1, 3, 5)))
    weight, w = stream_of(rows, channels * kernel[0] * kernel[1], g, random.choice((0.05, 0.3, 1)), at_end)
    x, bias = guarded(torch.randn(tokens, weight.cols), at_end), guarded(torch.randn(rows), at_end)
    y = spmm(weight, x, bias, "gelu", guarded(torch.empty(tokens, rows), at_end))
    x_columns = guarded(x.T.contiguous(), at_end)
    columns = spmm_columns(weight, x_columns, bias, "gelu", guarded(torch.empty(rows, tokens), at_end))
    torch.testing.assert_close(columns.T, y, atol=1e-4, rtol=1e-4)
    image, padding = guarded(torch.randn(2, channels, 9, random.randint(5, 40)), at_end), (1, 2)
    exact = conv2d(image, w.reshape(rows, channels, *kernel), bias, padding=padding)
    spmm_conv(weight, image, kernel, padding, bias, out=guarded(torch.empty_like(exact), at_end))
    if g == 1:
        by_runs = guarded(torch.empty_like(exact), at_end)
        spmm_conv(replace(weight, runs=True), image, kernel, padding, bias, out=by_runs)
        torch.testing.assert_close(by_runs, exact, atol=1e-4, rtol=1e-4)
    window = Window((kernel[1], kernel[1]), (random.choice((1, 2)),) * 2, (kernel[1] // 2,) * 4)
    pixels = guarded(torch.randn(2, channels, 9, random.choice((7, 14, 17, 32))), at_end)
    each = guarded(torch.randn(channels, *window.kernel), at_end)
    room = guarded(torch.empty(2, channels, *window.output(*pixels.shape[-2:])), at_end)
    depthwise(each, pixels, window, guarded(bias[:1].repeat(channels), at_end), "silu", guarded(room, at_end), room)
    if target.supports("bitmask") is None:
        stored = Bitmask.from_dense(w)
        parts = [guarded(part, at_end) for part in (stored.bits, stored.offsets, stored.values)]
        bitmask_matvec(*parts, rows, weight.cols, guarded(x[:8].clone(), at_end), bias, "relu")
        for dtype in (torch.float32, torch.bfloat16):
            tiles = TileBitmask.from_dense(w.to(dtype))
            tiles = tiles.with_parts({name: guarded(part, at_end) for name, part in tiles.parts().items()})
            TileProduct.of(tiles)(guarded(x[:8].to(dtype).clone(), at_end), bias, "relu")


def one_round_in_panels(at_end):
    from gossamer.kernels.cpu.attention import plan_attention
    from gossamer.kernels.cpu.elementwise import plan_elementwise, plan_rotary, rotary_table
    from gossamer.kernels.cpu.embed import plan_embed
    from gossamer.kernels.cpu.norm import plan_layer_norm
    from gossamer.kernels.cpu.tokens import empty_panels, plan_panels_to_rows, plan_rows_to_panels

    def run(plan, *tensors):
        plan.run(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors))

    batch, seq, heads, dim = (
        random.randint(1, 3),
        random.randint(1, 90),
        random.randint(1, 3),
        2 * random.randint(1, 10),
    )
    features, threads = heads * dim, torch.get_num_threads()
    ids = guarded(torch.randint(7, (batch, seq)), at_end)
    words, places = guarded(torch.randn(7, features), at_end), guarded(torch.randn(seq, features), at_end)
    bad = guarded(torch.zeros(1, dtype=torch.int64), at_end)
    room = empty_panels(batch, seq, features)
    x, y, z, rows = (guarded(tensor, at_end) for tensor in (room, room, room, words[ids]))
    run(plan_embed(batch, seq, features, (7, seq), threads=threads), ids, words, None, places, None, None, x, bad)
    gamma, mask = guarded(torch.randn(features), at_end), guarded(torch.randn(batch, seq), at_end)
    run(plan_layer_norm(len(x), features, 1e-5, threads=threads), x, x, gamma, gamma, x)
    angle = torch.randn(seq, dim // 2)
    cos, sin = (guarded(rotary_table(table), at_end) for table in (angle.cos(), angle.sin()))
    run(plan_rotary(batch, seq, heads, dim, threads=threads), x, cos, sin, y)
    run(plan_attention(batch, seq, heads, dim, causal=at_end, threads=threads), y, y, x, z, mask)
    run(plan_elementwise(len(x), features, form="add", activation="silu", threads=threads), x, z, y)
    run(plan_panels_to_rows(batch, seq, features, threads=threads), y, rows)
    run(plan_rows_to_panels(batch, seq, features, threads=threads), rows, x)
    assert rows.isfinite().all() and int(bad) == 0


if __name__ == "__main__":
    from gossamer.kernels.cpu import attention, decode, elementwise, embed, norm, plan, tokens

    for module in (attention, elementwise, embed, norm, tokens):
        module.GRAIN = 1

    plan.GRAIN = decode.GRAIN = 1
    random.seed(0), torch.manual_seed(0)
    for number in range(120):
        torch.set_num_threads(1 + number % 2)
        one_round(at_end=number % 3 > 0)
        one_round_in_panels(at_end=number % 3 > 0)
