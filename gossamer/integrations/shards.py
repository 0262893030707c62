"""Shards: the weight files of a transformers folder, their zeros left out in a layout, and their checksums."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import FileDamaged
from ..core.files import digest, whole_file
from ..deploy.save import seal_of, sealed
from ..deploy.tensors import COMPRESS_BELOW, kept_entries
from ..formats.checks import BITS_OF
from ..formats.layouts import Layout, Parts

INDEX, SIDECAR = "model.safetensors.index.json", "gossamer-pretrained.json"
SUFFIX = ".weight"


@dataclass(frozen=True)
class Written:
    """What packing a folder's shards did.

    Args:
        packed: names of the weights whose zeros were left out.
        entries: of all float tensors together.
        kept: those that are not zero.
    """

    packed: tuple[str, ...]
    entries: int
    kept: int


def shards(folder: Path) -> list[Path]:
    """The weight files, in order."""
    return sorted(folder.glob("*.safetensors"))


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, one at a time.

    Raises:
        FileDamaged: the file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - this is not a dict
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise FileDamaged(f"{file} cannot be read ({error}); restore it or save the model again") from error


def leave_out_zeros(folder: Path, layout: Layout, unfit: Callable[[str, Tensor], bool]) -> Written:
    """Write every shard again with its sparse weights in a layout, file by file.

    Weights that differ by numbers in their names only, such as a layer's experts, are packed together or not at all,
    for transformers gathers them part by part.

    Args:
        unfit: of a weight's name and values, whether to leave it as it is.
    """
    packed, entries, kept = _chosen(folder, unfit)
    where: dict[str, str] = {}
    for file in shards(folder):
        parts: Parts = {}
        for name, w in tensors_of(file):
            parts |= layout.parts(name, w) if name in packed else {name: w}
        with whole_file(file) as draft:  # its own tensors may still lie in the old file
            save_file(parts, draft, metadata={"format": "pt"})
        where |= dict.fromkeys(parts, file.name)
    _index(folder, where)
    return Written(tuple(sorted(packed)), entries, kept)


def _chosen(folder: Path, unfit: Callable[[str, Tensor], bool]) -> tuple[set[str], int, int]:
    groups: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    refused, all_entries, all_kept = set(), 0, 0
    for file in shards(folder):
        for name, w in tensors_of(file):
            if w.dtype not in BITS_OF:
                continue
            kept, kind = kept_entries(w), re.sub(r"\d+", "*", name)
            all_entries, all_kept = all_entries + w.numel(), all_kept + kept
            if w.dim() < 2 or not name.endswith(SUFFIX) or unfit(name, w):
                refused.add(kind)
            groups[kind].append((name, kept, w.numel()))
    chosen = {
        name
        for kind, members in groups.items()
        if kind not in refused and sum(k for _, k, _ in members) < COMPRESS_BELOW * sum(n for *_, n in members)
        for name, *_ in members
    }
    return chosen, all_entries, all_kept


def _index(folder: Path, where: dict[str, str]) -> None:
    file = folder / INDEX
    if not file.exists():
        return
    index = json.loads(file.read_text())
    index["weight_map"] = dict(sorted(where.items()))
    index["metadata"]["total_size"] = sum(f.stat().st_size for f in shards(folder))
    file.write_text(json.dumps(index, indent=2) + "\n")


def write_sidecar(folder: Path, record: dict[str, Any]) -> None:
    """Write the record that lies beside the shards, with the checksum of each of them."""
    files = {f.name: {"bytes": f.stat().st_size, "sha256": digest(f)} for f in _checked_files(folder)}
    (folder / SIDECAR).write_text(sealed({**record, "files": files}))


def _checked_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    return [*shards(folder), *([index] if index.exists() else [])]


def read_sidecar(folder: Path) -> dict[str, Any] | None:
    """The record beside the shards; None where there is none.

    Raises:
        FileDamaged: it cannot be read, or was altered.
    """
    file = folder / SIDECAR
    try:
        record = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FileDamaged(f"{file} cannot be read ({error}); restore it or save the model again") from error
    if not isinstance(record, dict) or record.get("sha256") != seal_of(record):
        raise FileDamaged(f"{file} was altered: its content does not match its own checksum; save the model again")
    return record


def verify(folder: Path) -> None:
    """Compare every shard with the checksum beside it, where there is one (about a second per gigabyte).

    Raises:
        FileDamaged: a shard is missing, truncated or altered; it is named.
    """
    record = read_sidecar(folder)
    for name, want in (record or {"files": {}})["files"].items():
        file = folder / name
        if not file.exists():
            raise FileDamaged(f"{file} is missing; restore it or save the model again")
        size = file.stat().st_size
        if size != want["bytes"]:
            raise FileDamaged(f"{file} has {size} bytes instead of {want['bytes']}; restore it or save the model again")
        if digest(file) != want["sha256"]:
            raise FileDamaged(f"{file} was altered: its checksum differs; restore it or save the model again")
