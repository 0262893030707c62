"""Consecutive kernel calls of a plan as one native call, with all arguments laid out beforehand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.cpu.launch import Launch
from ..kernels.cpu.sequence import kernel, yield_at
from ..kernels.cpu.threads import team_size_at

# Counters and scratch address stand before the addresses of a block.
_BEFORE = 3
_LINE = 64


@dataclass(frozen=True)
class Place:
    """Where a run's own tensor is handed over: an operand whose address is known only then."""

    slot: int


class NativeSequence:
    """Kernel calls in a row. One run at a time, as its plan.

    Args:
        calls: launches with the addresses of their operands, in the launch's order.
        scratch_at: scratch memory large enough for any of them.
    """

    def __init__(self, calls: Sequence[tuple[Launch, Sequence[int | Place]]], scratch_at: int) -> None:
        self.holds = [launch for launch, _ in calls]
        self.threads = max(launch.threads for launch, _ in calls) if team_size_at() else 1
        sizes = [-(-launch.block.size // _LINE) * _LINE for launch, _ in calls]
        self.blocks = _cells(sum(sizes) // 8 + _LINE // 8)
        base = -(-ctypes.addressof(self.blocks) // _LINE) * _LINE
        first = (base - ctypes.addressof(self.blocks)) // 8
        table: list[int] = []
        self.patches: list[tuple[int, int]] = []
        offset = 0
        for (launch, operands), size in zip(calls, sizes):
            known = [0 if isinstance(x, Place) else x for x in operands]
            launch.block.pack_into(self.blocks, 8 * first + offset, 0, 0, scratch_at, *known, launch.fixed)
            cell = first + offset // 8 + _BEFORE
            self.patches += [(cell + i, x.slot) for i, x in enumerate(operands) if isinstance(x, Place)]
            table += [launch.entry.address, base + offset, min(launch.threads, self.threads)]
            offset += size
        self.table = _cells(len(table), table)
        self.arrived = _cells(1)
        at = ctypes.addressof
        team = team_size_at() if self.threads > 1 else 0
        head = [0, 0, 0, at(self.table), len(calls), team, at(self.arrived), 0, yield_at()]
        self.args = _cells(len(head), head)
        self.args_at, self.entry = at(self.args), kernel()

    def run(self, env: list) -> None:
        """Run all calls, on these tensors where operands were left open."""
        for cell, slot in self.patches:
            self.blocks[cell] = env[slot].data_ptr()
        args = self.args
        args[0], args[7] = 0, self.arrived[0]
        self.entry.run(self.args_at, self.threads)


def _cells(count: int, values: Sequence[int] = ()) -> ctypes.Array:
    return (ctypes.c_int64 * max(count, 1))(*values)


def opening(slot: int, shape: tuple[int, ...]) -> Callable[[list], None]:
    """Makes the tensor that a later call writes."""

    def step(env: list) -> None:
        env[slot] = torch.empty(shape)

    return step
