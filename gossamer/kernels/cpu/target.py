"""What this processor can do: features, lanes of one vector register, and which kernels can run.

The same answer must be given here and to Numba's code generator, so both read NUMBA_CPU_FEATURES and NUMBA_CPU_NAME.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_BASELINE = {"spmm", "spmm_columns", "spmm_conv", "spgemm"}
_EXPANDING = {"bitmask", "bitmask_float32", "bitmask_bfloat16"}
_BFLOAT16_DOT = {"int4groups"}


@functools.cache
def features() -> frozenset[str]:
    """Names of the instruction sets that generated code may use, as LLVM spells them."""
    named = os.environ.get("NUMBA_CPU_FEATURES")
    if named is not None:
        return frozenset(part[1:] for part in named.split(",") if part.startswith("+")) | _implied()
    binding = _llvm()
    return frozenset(name for name, on in binding.get_host_cpu_features().items() if on) if binding else frozenset()


def _llvm():
    """LLVM as Numba ships it; None where it is missing or broken, so that only kernels fail, with a reason."""
    try:
        from llvmlite import binding
    except (ImportError, OSError):
        return None
    return binding


def _implied() -> frozenset[str]:
    """Features that a CPU name brings by itself when the feature list is overridden."""
    name = os.environ.get("NUMBA_CPU_NAME", "generic")
    avx2 = frozenset({"avx", "avx2", "fma"})
    return {"haswell": avx2, "skylake": avx2, "znver2": avx2, "znver3": avx2}.get(name, frozenset())


@functools.cache
def cpu_name() -> str:
    """The processor's name in LLVM, for example "znver5"."""
    named = os.environ.get("NUMBA_CPU_NAME")
    if named and named != "host":
        return named
    binding = _llvm()
    return (binding.get_host_cpu_name() if binding else "") or "generic"


def cpuinfo(field: str) -> str:
    """What the system says about the first processor under this name; "" where it says nothing."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


@functools.cache
def cpu_model() -> str:
    """The processor's name as sold, for example "AMD EPYC"."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def lanes() -> int:
    """Float32 lanes of one vector register: 16 (AVX-512), 8 (AVX2 with fma) or 4 (NEON, SSE)."""
    if "avx512f" in features():
        return 16
    return 8 if {"avx2", "fma"} <= features() else 4


def supports(kernel_name: str) -> str | None:
    """Say why a kernel cannot run here; None when it can.

    Args:
        kernel_name: "spmm", "spmm_columns", "spmm_conv", "spgemm", "bitmask", "bitmask_float32",
            "bitmask_bfloat16" or "int4groups".

    Raises:
        UnknownName: none of these; near names are listed.

    Example:
        >>> supports("spmm") is None
        True
    """
    if kernel_name in _BASELINE:
        return None
    if kernel_name in _BFLOAT16_DOT:
        if {"avx512bf16", "avx512bw"} <= features():
            return None
        return f"{kernel_name} multiplies by AVX-512's bfloat16 dot product, which {cpu_name()} does not have"
    if kernel_name not in _EXPANDING:
        from gossamer.core.errors import unknown

        raise unknown("CPU kernel", kernel_name, _BASELINE | _EXPANDING | _BFLOAT16_DOT)
    if "avx512f" in features():
        return None
    return f"{kernel_name} spreads values over lanes with AVX-512's expand, which {cpu_name()} does not have"
