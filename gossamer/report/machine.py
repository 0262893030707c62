"""What a figure was measured on: the processor, its memory, and the versions of the libraries."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from ..kernels.cpu.target import cpu_model, cpuinfo

ABSENT = "not installed"


def hardware() -> dict[str, str]:
    """Processor, cores that this process may use, memory, vector extensions, system."""
    return {
        "cpu": cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": _memory(),
        "vectors": ", ".join(_vectors()) or "unknown",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def versions(packages: Iterable[str] = ("torch", "numba", "transformers", "onnxruntime", "openvino")) -> dict[str, str]:
    """Installed versions; `ABSENT` where there is none."""
    return {name: _version(name) for name in packages}


def slug() -> str:
    """The processor's name as part of a file name."""
    words = "".join(c if c.isalnum() else " " for c in f"{hardware()['cpu']} {hardware()['cores']} cores").lower()
    return "-".join(words.split())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _vectors() -> list[str]:
    telling = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
    flags = set((cpuinfo("flags") or cpuinfo("Features")).split())
    return [name for name in telling if name in flags]
