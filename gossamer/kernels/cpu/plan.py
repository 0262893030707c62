"""Work laid out once per size of x: tasks, scratch memory and the argument block of the sparse kernels.

Shapes: M output rows, E stored entries.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.cpu.stream import Stream
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.workplace import workplace

# How x and y lie in memory (`panels.ROW_MAJOR` and its neighbours).
ROW_MAJOR, COLUMN_MAJOR, PANEL_MAJOR = range(3)

# The arguments of one call come first, then those of a plan (see `panels.SLOT` and its neighbours).
_pack_into = struct.Struct("=6q208s").pack_into
_pack_plan = struct.Struct("=26q").pack
# Plans kept per weight; serving many different sizes of x starts over beyond this.
_MOST_PLANS = 128
# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 500_000
# Rows that a kernel finishes together (`panels.BATCH`): wide enough that y is written in runs of four cache lines.
_BATCH = 64

# Constants whose addresses kernels receive: a zero bias, and the lower bounds "none" and "relu".
_ZEROS = torch.zeros(16, dtype=torch.float32, device="cpu")
_BOUNDS = torch.tensor([-torch.inf, 0.0], dtype=torch.float32, device="cpu")
_ZERO_AT, _BOUND_AT = _ZEROS.data_ptr(), _BOUNDS.data_ptr()

_kernels: dict[tuple[int, int], object] = {}
_widest: dict[int, int] = {}


def kernel_for(g: int, index_bytes: int):
    """The compiled kernel; Numba is imported here, on first use."""
    found = _kernels.get((g, index_bytes))
    if found is None:
        from gossamer.kernels.cpu import panels

        _widest[g] = panels.widest(g)
        found = _kernels[g, index_bytes] = panels.kernel(g, index_bytes)
    return found


def panel_width() -> int:
    """Tokens of one panel of `Panels` on this processor: four vectors."""
    return 4 * lanes()


def _chunks(places: int, batches: int, threads: int) -> int:
    """Into how many chunks of rows each panel is cut, so that no thread waits for long; 1 packs every panel once."""
    if threads == 1 or places == 0:
        return 1
    for chunks in range(1, 4 * threads):
        tasks = places * chunks
        if -(-tasks // threads) * threads <= 1.15 * tasks:
            return max(1, min(chunks, batches))
    return max(1, min(threads, batches))


@dataclass(frozen=True)
class Layout:
    """How x and y lie in memory; strides are in bytes."""

    tokens: int
    x_kind: int
    x_row: int
    y_kind: int
    y_row: int
    images: int = 1
    x_image: int = 0
    y_image: int = 0


@dataclass(frozen=True)
class Plan:
    """Work laid out for one size of x: the kernel, its fixed arguments, and what each call must bring."""

    entry: object
    threads: int
    scratch_bytes: int
    fixed: bytes
    addresses: tuple[int, int, int]


def known(stream: Stream, key: tuple) -> Plan | None:
    """The plan made earlier for this size of x, unless the weights have moved in memory since."""
    plan = stream.plans.get(key)
    return plan if plan is not None and plan.addresses == stream.addresses else None


def remember(stream: Stream, key: tuple, plan: object) -> None:
    """Keep a plan with its weights; serving many different sizes of x starts over now and then."""
    if len(stream.plans) >= _MOST_PLANS:
        stream.plans.clear()
    stream.plans[key] = plan


@dataclass(frozen=True)
class _Cut:
    """How the work is cut: `panels` of tokens per image x `chunks` of rows, tiles at most `wide` vectors wide."""

    panels: int
    chunks: int
    wide: int
    threads: int

    def tasks(self, images: int) -> int:
        return self.panels * self.chunks * images


def _cut(stream: Stream, layout: Layout, threads: int) -> _Cut:
    """Panels as wide as a register tile, and enough tasks for as many threads as the work pays for."""
    most = _widest[stream.g]
    in_panels = PANEL_MAJOR in (layout.x_kind, layout.y_kind)
    if in_panels:
        # Tiles must not straddle two panels of four vectors.
        most = 1 << (min(4, most).bit_length() - 1)
    vectors = -(-layout.tokens // lanes())
    panels = -(-vectors // most)
    wide = most if in_panels else -(-vectors // panels)
    worth = stream.values_EG.numel() * layout.tokens * layout.images // GRAIN
    threads = max(1, min(threads, worth))
    chunks = _chunks(panels * layout.images, -(-stream.rows // _BATCH), threads)
    return _Cut(panels, chunks, wide, min(threads, panels * chunks * layout.images))


def _memory(stream: Stream, layout: Layout, cut: _Cut) -> tuple[int, int, int]:
    """Scratch bytes of a thread; where its sums start; and bytes of sums kept per batch between column blocks."""
    tile = lanes() * cut.wide
    panel = 0 if layout.x_kind == PANEL_MAJOR else -(-4 * stream.cols * tile // 64) * 64
    batch = 4 * _BATCH * tile
    batches = -(-stream.rows // (_BATCH * cut.chunks)) if stream.blocks > 1 else 1
    return panel + batch * batches + 64, panel, batch if stream.blocks > 1 else 0


def make_plan(stream: Stream, key: tuple, layout: Layout, code: int, threads: int) -> Plan:
    """Lay the work out for one size of x and remember it under `key`."""
    starts_at, indices_at, values_at = stream.addresses
    entry = kernel_for(stream.g, stream.indices_E.element_size())
    cut = _cut(stream, layout, threads)
    scratch_bytes, sums_at, hold = _memory(stream, layout, cut)
    fixed = _pack_plan(
        cut.tasks(layout.images), cut.chunks, cut.panels, scratch_bytes,
        layout.x_kind, layout.y_kind, layout.x_row, layout.x_image, layout.y_row, layout.y_image,
        layout.tokens, stream.rows, stream.cols, stream.groups, stream.blocks, starts_at, indices_at, values_at,
        code, _BOUND_AT + 4 * (code == 1), _ZERO_AT,
        cut.wide, panel_width() // lanes(), 4 * panel_width(), sums_at, hold,
    )  # fmt: skip
    plan = Plan(entry, cut.threads, scratch_bytes * cut.threads, fixed, stream.addresses)
    remember(stream, key, plan)
    return plan


def run(plan: Plan, x_at: int, y_at: int, bias_M: Tensor | None) -> None:
    """Run a plan on the x and y at these addresses."""
    place = workplace
    scratch_at = place.scratch_of(plan.scratch_bytes)
    bias_at = 0 if bias_M is None else bias_M.data_ptr()
    _pack_into(place.args, 0, 0, 0, scratch_at, x_at, y_at, bias_at, plan.fixed)
    plan.entry.run(place.args_at, plan.threads)
