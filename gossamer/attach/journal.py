"""The journal: finished layers on disk. A killed run goes on where it stopped; weights need not fit in memory."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import FileDamaged, GossamerError, TargetError
from ..core.files import whole_file

_RECORD = "journal.json"


class Journal:
    """A folder with one safetensors file per finished layer and a record of the run it belongs to.

    Args:
        folder: where to keep it; made if missing.
        run: what makes two runs the same (method, options, layers and their shapes); JSON values only.

    Raises:
        TargetError: the folder holds another run; delete it or choose another.
        FileDamaged: its record cannot be read.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        run = json.loads(json.dumps(run))
        record = self.folder / _RECORD
        if record.exists():
            self._refuse_other(run, _json(record))
            for draft in self.folder.glob(".*.safetensors.*"):  # what a killed writer left
                draft.unlink(missing_ok=True)
        else:
            with whole_file(record) as draft:
                draft.write_text(json.dumps(run, indent=1))

    def _refuse_other(self, run: Mapping[str, object], held: Mapping[str, object]) -> None:
        for key in sorted({*run, *held}):
            if run.get(key) != held.get(key):
                raise TargetError(
                    f"{self.folder} holds a run with {key} = {held.get(key)!r}, but this one has {run.get(key)!r}; "
                    "delete the folder to start anew, or choose another"
                )

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.{kind}.safetensors"

    def finished(self, name: str, *, kind: str = "pruned") -> bool:
        """True if this layer's pruned weight is on disk."""
        return self._file(name, kind).exists()

    def write(self, name: str, w: Tensor, *, kind: str = "pruned", of: Tensor | None = None) -> None:
        """Put a weight on disk, all or nothing, with checksums of itself and of the dense weight it came from.

        Raises:
            GossamerError: the disk is full or cannot be written; what was finished before stays.
        """
        w = w.detach().contiguous().cpu()
        sums = {"sha256": digest(w), "of": "" if of is None else digest(of)}
        try:
            with whole_file(self._file(name, kind)) as draft:
                save_file({"weight": w}, draft, metadata=sums)
        except (OSError, SafetensorError) as error:
            raise GossamerError(
                f"layer {name!r} could not be written to {self.folder}: {error}; make room and run again, "
                "finished layers are kept"
            ) from error

    def read(self, name: str, current: Tensor) -> Tensor:
        """A finished layer's weight, if it was made from the weight that the model holds now (or is that weight).

        Raises:
            FileDamaged: the file cannot be read, or a bit of it has flipped; delete it and the layer is pruned again.
            TargetError: it was made from other weights.
        """
        file = self._file(name, "pruned")
        again = "delete it and this layer is pruned again"
        try:
            with safe_open(file, framework="pt") as held:
                w, sums = held.get_tensor("weight"), held.metadata() or {}
        except (SafetensorError, OSError, KeyError) as error:
            raise FileDamaged(f"{file} cannot be read ({error}); {again}") from error
        if digest(w) != sums.get("sha256"):
            raise FileDamaged(f"{file} is not what was written (its checksum differs); {again}")
        if digest(current) not in (sums.get("of"), sums.get("sha256")):
            raise TargetError(
                f"{file} was made from other weights than layer {name!r} holds now; load the model it belongs to, "
                "or choose another workdir"
            )
        return w

    def mapped(self, name: str, *, kind: str = "pruned") -> Tensor:
        """The weight as a view of its file: pages come in when read and need no memory of their own."""
        return map_tensor(self._file(name, kind), "weight")

    def forget(self, name: str, *, kind: str) -> None:
        """Delete a file that is no longer needed."""
        self._file(name, kind).unlink(missing_ok=True)


def digest(w: Tensor) -> str:
    """sha256 of a tensor's values in row-major order."""
    flat = w.detach().contiguous().cpu().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy() if flat.numel() else b"").hexdigest()


def data_digest(data: Sequence[object] | None) -> str:
    """One checksum over all tensors of all batches, in order."""
    total = hashlib.sha256()
    for batch in data or ():
        parts = (
            batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
        )
        for part in parts:
            total.update(digest(part).encode() if isinstance(part, Tensor) else repr(part).encode())
    return total.hexdigest()


def _json(file: Path) -> dict[str, object]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise FileDamaged(f"{file} is not JSON ({error}); delete the folder to start anew") from error


_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def map_tensor(file: Path, key: str) -> Tensor:
    """One tensor of a safetensors file, memory-mapped copy-on-write (writes never reach the file)."""
    with open(file, "rb") as handle:
        (header,) = struct.unpack("<Q", handle.read(8))
        entry = json.loads(handle.read(header))[key]
    begin, end = entry["data_offsets"]
    if end == begin:
        return torch.empty(entry["shape"], dtype=_TORCH[entry["dtype"]])
    raw = np.memmap(file, dtype=np.uint8, mode="c", offset=8 + header + begin, shape=(end - begin,))
    return torch.from_numpy(raw).view(_TORCH[entry["dtype"]]).view(entry["shape"])
