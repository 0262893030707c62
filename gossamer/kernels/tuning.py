"""Tuning: what was measured is kept on disk, so that the same work on the same machine is measured once.

One small JSON file per question, `<cache>/tunings/<machine>/<kind>-<digest of the key>.json`, written whole or not at
all, so that processes need no lock: the last writer wins, and a reader sees one answer or the other. A file that cannot
be read, or that answers another question, counts as not there. `GOSSAMER_TUNING=0` switches all of it off.

Times on the CPU only: `machine` names no other device, so whoever measures on one does not remember it here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

from gossamer.core.files import cache_root, whole_file
from gossamer.kernels.cpu.cache import abi_version
from gossamer.kernels.cpu.target import cpu_model, cpu_name, features

SWITCH = "GOSSAMER_TUNING"
_log = logging.getLogger("gossamer")
T = TypeVar("T")


def enabled() -> bool:
    """False where the environment variable `GOSSAMER_TUNING` is 0, off, no or false."""
    return os.environ.get(SWITCH, "1").strip().lower() not in ("0", "off", "no", "false")


def tuning_root() -> Path:
    """The folder that holds a folder of tunings per machine."""
    return cache_root() / "tunings"


@functools.cache
def machine() -> dict[str, str]:
    """What a time depends on besides the work: the processor, and the versions of whatever computes."""
    from gossamer import __version__

    return {
        "cpu": cpu_model(),
        "llvm_cpu": cpu_name(),
        "features": _digest(sorted(features())),
        "torch_vectors": torch.backends.cpu.get_cpu_capability(),
        "gossamer": __version__,
        "kernels": abi_version(),
        **{name: _version(name) for name in ("torch", "numba", "llvmlite")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def recall(kind: str, key: Mapping[str, object], read: Callable[[object], T]) -> T | None:
    """What was measured earlier, or None.

    Args:
        kind: who asks, such as "pack".
        key: all that the times depend on besides the machine; JSON-ready, anything else by its `str`.
        read: makes the answer of what `remember` was given; it raises KeyError, TypeError or ValueError where that
            is not what it should be, and the file is taken for damaged.

    Example:
        >>> recall("example", {"rows": 4}, float) is None
        True
    """
    if not enabled():
        return None
    file = _file(kind, key)
    try:
        record = json.loads(file.read_bytes())
        return read(record["value"]) if _asked(record) == (kind, _plain(key), machine()) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.info("%s cannot be read (%s: %s): measured again", file, type(error).__name__, error)
        return None


def remember(kind: str, key: Mapping[str, object], value: object) -> None:
    """Keep what was measured; a folder that cannot be written is no error, the next run measures again.

    Args:
        kind: as for `recall`.
        key: as for `recall`.
        value: JSON-ready.
    """
    if not enabled():
        return
    file = _file(kind, key)
    record = {"kind": kind, "key": _plain(key), "machine": machine(), "value": value}
    try:
        with whole_file(file) as draft:
            draft.write_text(json.dumps(record))
    except OSError as error:
        _log.info("%s cannot be written (%s): the next run measures again", file, error)


def finite_ms(value: object) -> float:
    """A time as `remember` wrote it.

    Raises:
        ValueError: not a number above 0, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is not a time")
    return float(value)


def _asked(record: Mapping) -> tuple:
    return record["kind"], record["key"], record["machine"]


def _file(kind: str, key: Mapping[str, object]) -> Path:
    return tuning_root() / _digest(machine()) / f"{kind}-{_digest(_plain(key))}.json"


def _plain(key: object) -> object:
    """As it will look when it comes back from a file."""
    return json.loads(json.dumps(key, default=str))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]
