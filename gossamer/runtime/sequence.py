"""Consecutive kernel calls of a plan as one native call, with all arguments laid out beforehand."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..kernels.cpu.bands import MEET, SHARED, STEP_BYTES
from ..kernels.cpu.conv_plan import GRAIN
from ..kernels.cpu.launch import Launch
from ..kernels.cpu.memory import floats
from ..kernels.cpu.threads import team_size_at, thread_number_at

# Counters and scratch address stand before the addresses of a block.
_BEFORE = 3
_LINE = 64


@dataclass(frozen=True)
class Place:
    """Where a run's own tensor is handed over: an operand whose address is known only then."""

    slot: int


@dataclass(frozen=True)
class _Step:
    """What a thread does at a step: all of a launch, shared with others or not, a band of it, or nothing."""

    number: int
    kind: int
    band: tuple[int, int] | None = None
    idle: bool = False

    @property
    def block(self) -> tuple[int, tuple[int, int] | None]:
        """Steps that are the same here share their block of arguments."""
        return self.number, self.band


def scratch_needed(launch: Launch, threads: int) -> int:
    """Bytes of scratch memory of a launch that so many threads may run in bands."""
    return max(launch.scratch_bytes, threads * launch.bands.scratch_bytes if launch.bands else 0)


class NativeSequence:
    """Kernel calls in a row. One run at a time, as its plan.

    A launch that falls into bands is cut once for each thread, so that a thread does the same part of the image in all
    of them; threads take the tasks of other launches as they come.

    Args:
        calls: launches with the addresses of their operands, in the launch's order.
        scratch_at: scratch memory large enough for any of them (see `scratch_needed`).
        threads: at most this many.
    """

    def __init__(self, calls: Sequence[tuple[Launch, Sequence[int | Place]]], scratch_at: int, threads: int) -> None:
        from ..kernels.cpu.sequence import kernel, yield_at

        self.calls, self.scratch_at, self.parts = calls, scratch_at, []
        work = sum(launch.bands.work for launch, _ in calls if launch.bands)
        paid = max(work // GRAIN, *(launch.threads for launch, _ in calls))
        self.threads = min(threads, paid) if team_size_at() else 1
        lists = [[_Step(number, 0) for number in range(len(calls))]]
        if self.threads > 1:
            launches = list(enumerate(launch for launch, _ in calls))
            lists += [[_share(n, launch, t, self.threads) for n, launch in launches] for t in range(self.threads)]
        self.patches: list[tuple[int, int, int]] = []
        self._lay_out(lists)
        self.arrived = _cells(1)
        at = ctypes.addressof
        team, who = (team_size_at(), thread_number_at()) if self.threads > 1 else (0, 0)
        head = [0, 0, 0, at(self.lists), self.threads, who, team, at(self.arrived), 0, yield_at()]
        self.args = _cells(len(head), head)
        self.args_at, self.entry = at(self.args), kernel()

    def _lay_out(self, lists: list[list[_Step]]) -> None:
        """Write the blocks of all steps, each once, and the lists that point to them."""
        owners = {step.block: (step, max(0, n - 1)) for n, steps in enumerate(lists) for step in steps}
        sizes = [-(-self.calls[step.number][0].block.size // _LINE) * _LINE for step, _ in owners.values()]
        self.blocks = _cells((sum(sizes) + _LINE) // 8)
        start = ctypes.addressof(self.blocks)
        base = -(-start // _LINE) * _LINE
        places = dict(zip(owners, accumulate([base, *sizes])))
        for key, (step, thread) in owners.items():
            self._write(step, places[key] - start, thread)
        rows = [(0 if s.idle else self._entry(s), places[s.block], s.kind) for steps in lists for s in steps]
        self.table = _cells(3 * len(rows), [x for row in rows for x in row])
        begin = ctypes.addressof(self.table)
        ends = [begin + STEP_BYTES * n for n in accumulate(len(steps) for steps in lists)]
        self.lists = _cells(2 * len(ends), [x for pair in zip([begin, *ends], ends) for x in pair])

    def _entry(self, step: _Step) -> int:
        return self.calls[step.number][0].entry.address

    def _write(self, step: _Step, offset: int, thread: int) -> None:
        """The block of a step's arguments; bands of different threads have scratch memory apart."""
        launch, operands = self.calls[step.number]
        shifts, fixed, scratch_at = (0,) * len(operands), launch.fixed, self.scratch_at
        if step.band is not None:
            part = launch.bands.part(*step.band)  # type: ignore[union-attr]
            shifts, fixed = part.shifts or shifts, struct.pack(f"={len(part.fixed)}q", *part.fixed)
            scratch_at += thread * launch.bands.scratch_bytes  # type: ignore[union-attr]
            self.parts.append(part)
        known = [0 if isinstance(x, Place) else x + s for x, s in zip(operands, shifts)]
        launch.block.pack_into(self.blocks, offset, 0, 0, scratch_at, *known, fixed)
        cell = offset // 8 + _BEFORE
        places = zip(range(cell, cell + len(known)), operands, shifts)
        self.patches += [(cell, x.slot, shift) for cell, x, shift in places if isinstance(x, Place)]

    def run(self, env: list) -> None:
        """Run all calls, on these tensors where operands were left open."""
        for cell, slot, shift in self.patches:
            self.blocks[cell] = env[slot].data_ptr() + shift
        self.args[8] = self.arrived[0]
        self.entry.run(self.args_at, self.threads)


def _share(number: int, launch: Launch, thread: int, threads: int) -> _Step:
    """What one of several threads does of a step."""
    if launch.bands is None:
        return _Step(number, MEET | SHARED, idle=thread >= launch.threads)
    first, last = launch.bands.edges(threads)[thread : thread + 2]
    if first == last:
        return _Step(number, MEET | SHARED, idle=True)
    return _Step(number, MEET, (first, last))


def _cells(count: int, values: Sequence[int] = ()) -> ctypes.Array:
    return (ctypes.c_int64 * max(count, 1))(*values)


def opening(slot: int, shape: tuple[int, ...]) -> Callable[[list], None]:
    """Makes the tensor that a later call writes."""

    def step(env: list) -> None:
        env[slot] = floats(*shape)

    return step
