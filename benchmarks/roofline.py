"""What this machine could do at most: multiply-adds from registers, bytes from each level of memory, per thread count.

    python -m benchmarks.roofline [--threads 1 2]

Loops in LLVM's own language, so that nothing stands between the figure and the processor: sixteen independent chains of
fused multiply-adds; eight vector loads a turn over a buffer in the first, the second, or no level of cache.
The best of several tries: a roof is what is possible, not what is typical.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

CHAINS, LOADS, TRIES = 16, 8, 7
# Buffer of each thread, and bytes read from it in one try (tens of milliseconds, beside which starting is nothing).
LEVELS = {"l1": (24 << 10, 32 << 30), "l2": (512 << 10, 16 << 30), "memory": (256 << 20, 4 << 30)}


@dataclass(frozen=True)
class Roof:
    """All threads together. Gigaflops (two per multiply-add) and gigabytes per second, reading."""

    threads: int
    fp32_gflops: float
    bf16_gflops: float | None
    l1_gbs: float
    l2_gbs: float
    memory_gbs: float

    def ms(self, *, flops: float = 0.0, bf16_flops: float = 0.0, bytes: float = 0.0) -> float:
        """The least time for a problem's `work`, operations in each type and bytes from memory: whichever is longer."""
        arithmetic = flops / self.fp32_gflops + bf16_flops / (self.bf16_gflops or self.fp32_gflops)
        return max(arithmetic, bytes / self.memory_gbs) / 1e6


def measure(threads: int) -> Roof:
    """Measure all roofs with so many threads."""
    speeds = {f"{name}_gbs": _bytes_per_second(threads, *level) / 1e9 for name, level in LEVELS.items()}
    wide = _flops_per_second("bf16", threads) / 1e9 if "avx512bf16" in _features() else None
    return Roof(threads, _flops_per_second("fp32", threads) / 1e9, wide, **speeds)


def _flops_per_second(kind: str, threads: int) -> float:
    turns = 10_000_000
    per_turn = 2 * CHAINS * _lanes() * (2 if kind == "bf16" else 1)
    run = functools.partial(_compiled(kind), turns)
    return threads * turns * per_turn / _best_seconds(run, threads)


def _bytes_per_second(threads: int, size: int, total: int) -> float:
    buffers = [_aligned(size) for _ in range(threads)]
    passes = total // size
    turns = size // (4 * LOADS * _lanes())
    runs = [functools.partial(_compiled("read"), b.ctypes.data, turns, turns * passes) for b in buffers]
    return threads * passes * size / _best_seconds(runs, threads)


def _aligned(size: int) -> np.ndarray:
    raw = np.ones(size // 4 + 16, np.float32)
    start = -(raw.ctypes.data // 4) % 16
    return raw[start : start + size // 4]


def _best_seconds(run: Callable | list[Callable], threads: int) -> float:
    """The shortest of several tries in which all threads work at once (ctypes lets go of the interpreter's lock)."""
    runs = run if isinstance(run, list) else [run] * threads
    taken = []
    for _ in range(TRIES):
        helpers = [threading.Thread(target=r) for r in runs[1:]]
        begin = time.perf_counter()
        for helper in helpers:
            helper.start()
        runs[0]()
        for helper in helpers:
            helper.join()
        taken.append(time.perf_counter() - begin)
    return min(taken)


@functools.cache
def _features() -> frozenset[str]:
    from llvmlite import binding

    return frozenset(name for name, on in binding.get_host_cpu_features().items() if on)


def _lanes() -> int:
    if "avx512f" in _features():
        return 16
    return 8 if {"avx2", "fma"} <= _features() else 4


@functools.cache
def _engine():
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    parts = [_fma("fp32"), _read()] + ([_fma("bf16")] if "avx512bf16" in _features() else [])
    engine = binding.create_mcjit_compiler(binding.parse_assembly("\n".join(parts)), machine)
    engine.finalize_object()
    return engine


@functools.cache
def _compiled(kind: str) -> Callable:
    numbers = 3 if kind == "read" else 1
    return ctypes.CFUNCTYPE(ctypes.c_float, *[ctypes.c_int64] * numbers)(_engine().get_function_address(kind))


def _fma(kind: str) -> str:
    """acc = acc * x + y in each of CHAINS accumulators; bf16 adds products of pairs."""
    vector, pairs = f"<{_lanes()} x float>", f"<{2 * _lanes()} x bfloat>"
    step, declare = {
        "fp32": (
            f"call {vector} @llvm.fma.v{_lanes()}f32({vector} {{acc}}, {vector} %half, {vector} %half)",
            f"declare {vector} @llvm.fma.v{_lanes()}f32({vector}, {vector}, {vector})",
        ),
        "bf16": (
            f"call {vector} @llvm.x86.avx512bf16.dpbf16ps.512({vector} {{acc}}, {pairs} %pair, {pairs} %pair)",
            f"declare {vector} @llvm.x86.avx512bf16.dpbf16ps.512({vector}, {pairs}, {pairs})",
        ),
    }[kind]
    body = [f"  %n{c} = {step.format(acc=f'%a{c}')}" for c in range(CHAINS)]
    setup = [
        "  %scalar = sitofp i64 %n to float",
        f"  %one = insertelement {vector} zeroinitializer, float %scalar, i32 0",
        f"  %half = fmul {vector} %one, %one",
        f"  %raw = bitcast {vector} %half to {pairs}",
        f"  %pair = fadd {pairs} %raw, %raw" if kind == "bf16" else "",
    ]
    return "\n".join([declare, *_loop(kind, "i64 %n", vector, CHAINS, setup, body)])


def _read() -> str:
    """Passes over a buffer, LOADS vectors a turn, each added to an accumulator of its own."""
    vector, wide = f"<{_lanes()} x float>", 4 * _lanes()
    turn = ["  %turn = phi i64 [ 0, %entry ], [ %ahead, %loop ]"]
    body = [
        f"  %at = mul i64 %turn, {LOADS * wide}",
        "  %here = add i64 %p, %at",
        "  %after = add i64 %turn, 1",
        "  %around = icmp eq i64 %after, %turns",
        "  %ahead = select i1 %around, i64 0, i64 %after",
    ]
    for c in range(LOADS):
        body += [
            f"  %o{c} = add i64 %here, {c * wide}",
            f"  %q{c} = inttoptr i64 %o{c} to ptr",
            f"  %v{c} = load {vector}, ptr %q{c}, align 64",
            f"  %n{c} = fadd {vector} %a{c}, %v{c}",
        ]
    return "\n".join(_loop("read", "i64 %p, i64 %turns, i64 %n", vector, LOADS, [], [*turn, *body]))


def _loop(name: str, args: str, vector: str, sums: int, setup: list[str], body: list[str]) -> list[str]:
    """A function that loops %n times over vector accumulators %a → %n and returns something of each."""
    phis = [f"  %a{c} = phi {vector} [ zeroinitializer, %entry ], [ %n{c}, %loop ]" for c in range(sums)]
    firsts = [f"  %f{c} = extractelement {vector} %n{c}, i32 0" for c in range(sums)]
    adds = [f"  %s{c} = fadd float {f'%s{c - 1}' if c else '0.0'}, %f{c}" for c in range(sums)]
    return [
        f"define float @{name}({args}) {{",
        "entry:",
        *setup,
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [ 0, %entry ], [ %next, %loop ]",
        *phis,
        *body,
        "  %next = add i64 %i, 1",
        "  %more = icmp slt i64 %next, %n",
        "  br i1 %more, label %loop, label %done",
        "done:",
        *firsts,
        *adds,
        f"  ret float %s{sums - 1}",
        "}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    for threads in parser.parse_args().threads:
        json.dump(asdict(measure(threads)), sys.stdout)
        print(flush=True)


if __name__ == "__main__":
    main()
