"""load: a saved model back into memory, every size, dtype, density and checksum compared with the record."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.errors import DispatchError, FileDamaged, FormatError, TargetError, UnknownName, near
from ..core.files import digest
from ..formats import format_from
from ..nn.conv import PackedConv2d
from ..nn.linear import PackedLinear
from ..nn.shape import Shape
from .fuse import FusedActivation, put
from .measure import reasons_in
from .record import PackReport
from .save import FORMAT_VERSION, RECORD, TENSORS, seal_of, tensor_digest
from .skeleton import build
from .tensors import dtype_name, held, kept_entries

log = logging.getLogger("gossamer")


def load(
    path: str | Path, model: nn.Module | None = None, *, device: str | torch.device = "cpu", verify: bool = True
) -> nn.Module:
    """Read a model that `save` wrote, and choose kernels for this machine.

    Args:
        path: the folder.
        model: an instance of your own class, whose tensors are replaced; not needed for models of transformers
            and of gossamer.data.vision.
        device: where to put it.
        verify: compare checksums (about a second per gigabyte). Sizes, dtypes and densities are always compared.

    Raises:
        FileDamaged: a file is missing, truncated, altered, or disagrees with its record; the tensor is named.
        TargetError: the model's class must be brought along, or the one given does not fit.

    Example:
        >>> model = load("minilm-sparse")  # doctest: +SKIP
    """
    path = Path(path)
    record = read_record(path)
    if verify:
        _verify(path / TENSORS, record)
    skeleton = model if model is not None else build(record["skeleton"])
    loaded = _fill(skeleton, record, _read(path / TENSORS, record))
    report = record.get("report")
    if report is not None:
        loaded.__dict__["gossamer_report"] = PackReport.from_dict(report)
    loaded.train(bool(record["training"])).to(device)
    _plan(loaded)
    return loaded


def read_record(path: str | Path) -> dict[str, Any]:
    """The JSON record of a saved model, whole and unaltered.

    Raises:
        FileDamaged: it is missing, unreadable or altered, or of a newer format.
    """
    file = Path(path) / RECORD
    try:
        record = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileDamaged(f"{path} holds no {RECORD}; give the folder that gossamer.save wrote") from None
    except (OSError, ValueError) as error:
        raise FileDamaged(f"{file} cannot be read ({error}); restore it or save the model again") from error
    if not isinstance(record, dict) or record.get("sha256") != seal_of(record):
        raise FileDamaged(f"{file} was altered: its content does not match its own checksum; save the model again")
    if record["format"] > FORMAT_VERSION:
        raise FileDamaged(
            f"{file} has format {record['format']}, this gossamer reads up to {FORMAT_VERSION}; install "
            f"gossamer {record['gossamer']} or later"
        )
    return record


def _verify(file: Path, record: Mapping[str, Any]) -> None:
    """Compare size and checksum; on a difference say which tensor it hit."""
    if not file.exists():
        raise FileDamaged(f"{file} is missing; restore it or save the model again")
    size, want = file.stat().st_size, record["file"]
    if size == want["bytes"] and digest(file) == want["sha256"]:
        return
    what = f"{size} bytes instead of {want['bytes']}" if size != want["bytes"] else "a checksum that differs"
    raise FileDamaged(f"{file} has {what}: {_first_bad(file, record)}; restore it or save the model again")


def _first_bad(file: Path, record: Mapping[str, Any]) -> str:
    if file.stat().st_size < record["file"]["bytes"] and (cut := _cut_off(file)):
        return f"cut off in or before tensor {cut!r}"
    try:
        with safe_open(file, framework="pt") as handle:
            for name, want in record["stored"].items():
                if tensor_digest(handle.get_tensor(name)) != want["sha256"]:
                    return f"tensor {name!r} was altered"
    except (SafetensorError, OSError, ValueError) as error:
        return f"its header cannot be read ({error})"
    return "its header was altered"


def _cut_off(file: Path) -> str | None:
    """The first tensor that reaches past the end of a truncated file."""
    with open(file, "rb") as handle:
        head = int.from_bytes(handle.read(8), "little")
        raw = handle.read(head)
    try:
        header = json.loads(raw)
    except ValueError:
        return None
    ends = sorted((e["data_offsets"][1], name) for name, e in header.items() if name != "__metadata__")
    return next((name for end, name in ends if 8 + head + end > file.stat().st_size), None)


def _read(file: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor under its own name, as the model held it, checked against the record."""
    try:
        with safe_open(file, framework="pt") as handle:
            found = set(handle.keys())
            if found != set(record["stored"]):
                odd = sorted(found ^ set(record["stored"]))
                raise FileDamaged(f"{file} and its record disagree on tensor {odd[0]!r}; save the model again")
            stored = {name: _checked(handle.get_tensor(name), name, want) for name, want in record["stored"].items()}
    except (SafetensorError, OSError) as error:
        raise FileDamaged(f"{file} cannot be read ({error}); restore it or save the model again") from error
    tensors = {name: t for name, t in stored.items() if "@" not in name}
    for name, meta in record["compressed"].items():
        tensors[name] = _decompress(name, meta, stored).view(record["tensors"][name]["shape"])
    for name, want in record["tensors"].items():
        _checked(tensors[name], name, want)
        if kept_entries(tensors[name]) != want["kept"]:
            raise FileDamaged(
                f"tensor {name!r} keeps {kept_entries(tensors[name])} entries, its record says {want['kept']}; "
                "the file was altered, save the model again"
            )
    return tensors


def _checked(t: Tensor, name: str, want: Mapping[str, Any]) -> Tensor:
    if dtype_name(t.dtype) != want["dtype"] or list(t.shape) != want["shape"]:
        raise FileDamaged(
            f"tensor {name!r} is {dtype_name(t.dtype)} {list(t.shape)}, its record says {want['dtype']} "
            f"{want['shape']}; file and record do not belong together"
        )
    return t


def _decompress(name: str, meta: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    parts = {key.rpartition("@")[2]: t for key, t in stored.items() if key.rpartition("@")[0] == name}
    return _format(name, meta, parts).to_dense()


def _format(name: str, meta: Mapping[str, Any], parts: Mapping[str, Tensor]):
    try:
        return format_from(meta, parts)
    except (FormatError, UnknownName) as error:
        raise FileDamaged(f"tensor {name!r}: {error}") from error


def _fill(model: nn.Module, record: Mapping[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    model = _swap_layers(model, record["layers"], tensors)
    for name in record["fused"]:
        original = _submodule(model, name)
        if not isinstance(original, FusedActivation):
            put(model, name, FusedActivation(original))
    for name, entry in record["tensors"].items():
        t = tensors[name]
        value = nn.Parameter(t, requires_grad=entry["trainable"]) if entry["kind"] == "parameter" else t
        _place(model, name, entry, value)
    for name, entry in record["aliases"].items():
        of = record["tensors"][entry["of"]]
        _place(model, name, entry, getattr(_submodule(model, of["module"]), of["attribute"]))
    known = {*record["tensors"], *record["aliases"]}
    missing = [h.name for h in held(model) if h.name not in known]
    if missing:
        raise TargetError(
            f"the model has tensors that were not saved, such as {missing[0]!r}; it is not the same model"
        )
    return model


def _swap_layers(model: nn.Module, layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    for name, entry in layers.items():
        here, convolution = _submodule(model, name), entry.get("convolution")
        inner = name if convolution is None else f"{name}.linear".lstrip(".")
        prefix = f"{inner}." if inner else ""
        names = [k[len(prefix) :] for k in tensors if k.startswith(prefix) and "." not in k[len(prefix) :]]
        bias = tensors.get(prefix + "bias")
        fmt = _format(name, entry["meta"], {k: tensors[prefix + k] for k in names if k != "bias"})
        if fmt.nnz != entry["kept"] or list(fmt.shape) != entry["shape"]:
            raise FileDamaged(
                f"layer {name!r} keeps {fmt.nnz} of {list(fmt.shape)} entries, its record says {entry['kept']} "
                f"of {entry['shape']}; the file was altered, save the model again"
            )
        packed = PackedLinear(
            fmt, bias, activation=entry["activation"], backend=entry["backend"], tokens=entry["tokens"]
        )
        packed.transposed = entry["transposed"]
        if convolution is None:
            _fits(name, here, fmt.shape)
        else:
            packed = PackedConv2d(packed, _same_convolution(name, here, convolution, fmt.shape))
        if name:
            put(model, name, packed)
        else:
            model = packed
    return model


def _same_convolution(name: str, here: nn.Module, saved: Mapping[str, Any], shape: tuple[int, int]) -> Shape:
    """What the layer that is replaced is besides its weight; it must be the convolution that was packed."""
    found = here.shape if isinstance(here, PackedConv2d) else _shape_of(name, here)
    found = replace(found, channels_last=saved["channels_last"])  # which a skeleton does not know
    outputs = here.linear.out_features if isinstance(here, PackedConv2d) else here.out_channels
    if found.record() != dict(saved) or (outputs, found.columns) != shape:
        raise TargetError(
            f"layer {name!r} of the model given is a convolution {found.record()} with {outputs} outputs, the saved "
            f"one is {dict(saved)} with {shape[0]}; pass the model that was saved"
        )
    return found


def _shape_of(name: str, here: nn.Module) -> Shape:
    try:
        return Shape.of(here)
    except FormatError as error:
        raise TargetError(f"layer {name!r} is saved as a convolution: {error}; pass the model saved") from error


def _fits(name: str, here: nn.Module, shape: tuple[int, int]) -> None:
    """The layer that is replaced must have the sizes of the one that was packed."""
    sizes = (
        getattr(here, "out_features", getattr(here, "nf", None)),
        getattr(here, "in_features", getattr(here, "nx", None)),
    )
    if None in sizes or sizes != shape:
        raise TargetError(
            f"layer {name!r} of the model given is a {type(here).__name__} of sizes {sizes}, the saved one has "
            f"{shape}; pass the model that was saved"
        )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        known = [n for n, _ in model.named_modules() if n]
        raise TargetError(f"the model given has no module {name!r}; {near(name, known)}") from None


def _place(model: nn.Module, name: str, entry: Mapping[str, Any], value: Tensor) -> None:
    module, attribute = _submodule(model, entry["module"]), entry["attribute"]
    if entry["kind"] == "attribute":
        module.__dict__[attribute] = value
        return
    table = module._parameters if entry["kind"] == "parameter" else module._buffers
    old = table.get(attribute)
    if old is None or (old.shape != value.shape and not _lazy(old)):
        has = "no such tensor" if old is None else f"one of shape {list(old.shape)}"
        raise TargetError(
            f"tensor {name!r} {list(value.shape)} was saved, but the model given has {has}; pass the saved one"
        )
    table[attribute] = value


def _lazy(t: Tensor) -> bool:
    """A meta buffer whose length depends on values that a skeleton does not have."""
    return t.is_meta and t.dim() <= 1


def _plan(model: nn.Module) -> None:
    """Prepare every packed layer's kernel here; a backend that this machine lacks gives way, and it is said."""
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        try:
            _ = layer.plan
        except DispatchError as error:
            recorded, layer.backend = layer.backend, None
            layer.replan()
            log.warning(
                "layer %s was saved for %s, which cannot run here (%s); it runs on %s",
                name,
                recorded,
                reasons_in(error),
                layer.plan.kernel,
            )
