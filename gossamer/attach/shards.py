"""Shards: the safetensors files of a checkpoint, read by header and mapped tensor by tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import FileDamaged
from ..core.files import whole_folder

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Args:
        start: of its bytes, from the file's beginning. Unit: bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def mapped(self) -> Tensor:
        """The tensor as a view of its file, copy-on-write: pages come in when read, writes never reach the file."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        raw = np.memmap(self.file, dtype=np.uint8, mode="c", offset=self.start, shape=(self.nbytes,))
        return torch.from_numpy(raw).view(self.dtype).view(self.shape)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file.

    Raises:
        FileDamaged: the header cannot be read, or the file is not as long as it says.
    """
    try:
        with open(file, "rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            if size > file.stat().st_size:
                raise ValueError(f"a header of {size} bytes")
            held = json.loads(handle.read(size))
        held.pop("__metadata__", None)
        entries = {key: _entry(file, 8 + size, row) for key, row in held.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise FileDamaged(f"{file} is not a safetensors file ({error}); fetch it again") from error
    end = max((e.start + e.nbytes for e in entries.values()), default=8 + size)
    if end != file.stat().st_size:
        raise FileDamaged(f"{file} has {file.stat().st_size} bytes where its header says {end}; fetch it again")
    return entries


def _entry(file: Path, base: int, row: Mapping[str, object]) -> Entry:
    begin, end = row["data_offsets"]  # type: ignore[misc]
    dtype, shape = DTYPES[str(row["dtype"])], tuple(row["shape"])  # type: ignore[arg-type]
    if end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a {list(shape)} tensor of {dtype}")
    return Entry(file, dtype, shape, base + begin, end - begin)


def read_shards(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint folder, by the names they have there.

    Raises:
        FileDamaged: no safetensors file, or one that is missing, truncated or without a tensor of the index.
    """
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise FileDamaged(f"{folder} holds neither {INDEX} nor {SINGLE}; save the model as safetensors first")
        return read_header(folder / SINGLE)
    try:
        where = json.loads((folder / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise FileDamaged(f"{folder / INDEX} cannot be read ({error}); fetch it again") from error
    held = {name: read_header(folder / name) for name in sorted(set(where.values()))}
    if missing := [key for key, name in where.items() if key not in held[name]]:
        raise FileDamaged(
            f"{folder / where[missing[0]]} lacks {missing[0]!r}, which the index promises; fetch it again"
        )
    return {key: held[name][key] for key, name in where.items()}


def rewrite(
    folder: Path, out: Path, changed: Mapping[Entry, Callable[[], Tensor]], extra: Mapping[str, str] | None = None
) -> None:
    """A copy of a checkpoint folder in which some tensors have other values; all of it or nothing.

    Args:
        changed: new values by place, read one at a time; of the stored shape, cast to the stored dtype.
        extra: texts of files to add, by name.
    """
    with whole_folder(out) as draft:
        for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
            shutil.copyfile(file, draft / file.name)
        for entry, read in changed.items():
            w = read().detach().to(entry.dtype).contiguous().reshape(-1)
            with open(draft / entry.file.name, "r+b") as handle:
                handle.seek(entry.start)
                handle.write(w.view(torch.uint8).numpy())
        for name, text in (extra or {}).items():
            (draft / name).write_text(text)
