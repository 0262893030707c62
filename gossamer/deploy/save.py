"""save: a model into a folder, safetensors and JSON, all or nothing, with a checksum on everything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import GossamerError, TargetError
from ..core.files import digest, whole_folder
from ..nn.conv import PackedConv2d
from ..nn.linear import PackedLinear
from .fuse import FusedActivation
from .layers import matrix_of, packed_layers, refuse_masks
from .skeleton import describe
from .tensors import Held, compress, compressible, dtype_name, kept_entries, once, packed_parts, plain

RECORD, TENSORS = "gossamer.json", "model.safetensors"
FORMAT_VERSION = 1


class Tokenizer(Protocol):
    """Anything that writes itself into a folder, as transformers' tokenizers do."""

    def save_pretrained(self, folder: str) -> object: ...


def save(model: nn.Module, path: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
    """Write a model, packed or only pruned, to a folder.

    The folder holds `model.safetensors` (every tensor: parameters, all buffers, the parts of sparse formats; tied
    tensors once) and `gossamer.json` (how to build the modules, a record per packed layer, and for every tensor
    its dtype, shape, number of kept entries and sha256). Dense weights with more than 10 % zeros are stored as
    bitmasks and come back dense.

    Nothing half-written ever has the name. Replacing an earlier save is one step on Linux; elsewhere, or on a file
    system without that step, the name is missing for a moment between two renames.

    Args:
        path: the folder; an earlier save there is replaced.
        tokenizer: saved beside the model.

    Returns:
        The folder.

    Raises:
        TargetError: masks are still attached (call `handle.remove()`), or tensors are on `meta`.
        GossamerError: the folder holds something else, or the disk is full; nothing is left behind.

    Example:
        >>> save(packed, "minilm-sparse")  # doctest: +SKIP
    """
    path = Path(path)
    refuse_masks(model)
    _refuse_foreign(path)
    stored, record = _contents(model)
    try:
        with whole_folder(path) as draft:
            save_file(stored, draft / TENSORS, metadata={"gossamer": str(FORMAT_VERSION)})
            record["file"] = {"bytes": (draft / TENSORS).stat().st_size, "sha256": digest(draft / TENSORS)}
            (draft / RECORD).write_text(sealed(record))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(draft))
    except (OSError, SafetensorError) as error:
        raise GossamerError(
            f"the model could not be written to {path}: {error}; make room or choose another place "
            "(nothing was left behind, and an earlier save there is as it was)"
        ) from error
    return path


def _refuse_foreign(path: Path) -> None:
    """A save replaces the whole folder, so the folder must be ours."""
    if path.is_file():
        raise GossamerError(f"{path} is a file; save writes a folder, so choose another name")
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD).exists():
        raise GossamerError(f"{path} holds files that are not a saved model and would be replaced; choose a new folder")


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from .. import __version__

    unique, aliases = once(model)
    on_meta = [name for name, h in unique.items() if h.tensor.is_meta]
    if on_meta:
        raise TargetError(f"{len(on_meta)} tensors are on the meta device ({on_meta[0]} ...) and have no values")
    inside = packed_parts(model)
    stored: dict[str, Tensor] = {}
    compressed: dict[str, Any] = {}
    for name, h in unique.items():
        if name not in inside and compressible(h):
            compressed[name] = _compress_into(stored, name, h)
        else:
            stored[name] = plain(h.tensor)
    record = {
        "format": FORMAT_VERSION,
        "gossamer": __version__,
        "skeleton": describe(model),
        "layers": {name: _layer(layer) for name, layer in packed_layers(model).items()},
        "fused": [name for name, m in model.named_modules() if isinstance(m, FusedActivation)],
        "tensors": {name: _tensor(h) for name, h in unique.items()},
        "aliases": dict(_aliases(model, aliases)),
        "compressed": compressed,
        "stored": {name: _stored(t) for name, t in stored.items()},
        "training": model.training,
        "report": _report(model),
    }
    return stored, record


def _compress_into(stored: dict[str, Tensor], name: str, h: Held) -> dict[str, Any]:
    bitmask = compress(h.tensor)
    stored.update({f"{name}@{part}": plain(t) for part, t in bitmask.parts().items()})
    return bitmask.meta()


def _layer(packed: PackedLinear | PackedConv2d) -> dict[str, Any]:
    layer = matrix_of(packed)
    fmt = layer.fmt
    return {
        "convolution": packed.shape.record() if isinstance(packed, PackedConv2d) else None,
        "meta": fmt.meta(),
        "shape": list(fmt.shape),
        "dtype": dtype_name(fmt.dtype),
        "density": fmt.density,
        "kept": fmt.nnz,
        "activation": layer.activation,
        "backend": layer.backend,
        "tokens": layer.tokens,
        "transposed": layer.transposed,
    }


def _tensor(h: Held) -> dict[str, Any]:
    t = h.tensor
    return {
        "module": h.module,
        "attribute": h.attribute,
        "kind": h.kind,
        "dtype": dtype_name(t.dtype),
        "shape": list(t.shape),
        "kept": kept_entries(t),
        "trainable": bool(h.kind == "parameter" and t.requires_grad),
    }


def _aliases(model: nn.Module, aliases: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    from .tensors import held

    for h in held(model):
        if h.name in aliases:
            yield h.name, {"of": aliases[h.name], "module": h.module, "attribute": h.attribute, "kind": h.kind}


def _stored(t: Tensor) -> dict[str, Any]:
    return {"dtype": dtype_name(t.dtype), "shape": list(t.shape), "sha256": tensor_digest(t)}


def _report(model: nn.Module) -> dict[str, Any] | None:
    report = model.__dict__.get("gossamer_report")
    return None if report is None else report.to_dict()


def tensor_digest(t: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    from torch import uint8

    raw = t.contiguous().reshape(-1).view(uint8) if t.numel() else t.new_empty(0, dtype=uint8)
    return hashlib.sha256(memoryview(raw.numpy())).hexdigest()


def sealed(record: dict[str, Any]) -> str:
    """The record as JSON, with the sha256 of its own content."""
    return json.dumps({**record, "sha256": seal_of(record)}, indent=1)


def seal_of(record: dict[str, Any]) -> str:
    """sha256 of a record without its seal, in one spelling."""
    bare = {k: v for k, v in record.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()
