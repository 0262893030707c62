"""Packing record: what `pack` chose for each layer, and the same layers made again from dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.errors import FileDamaged, FormatError, TargetError
from ..deploy.candidates import Candidate
from ..deploy.fuse import FusedActivation, put
from ..deploy.layers import matrix_of, packed_layers
from ..deploy.load import _plan
from ..deploy.record import PackReport
from ..formats import Int4Groups
from ..nn.conv import PackedConv2d
from ..nn.linear import PackedLinear

Packed = PackedLinear | PackedConv2d


def packing_record(model: nn.Module) -> dict[str, Any]:
    """Format, options, backend and activation of every packed layer, and the report of `pack`.

    Raises:
        TargetError: a layer holds 4-bit weights, which dense ones do not give back.
    """
    from .. import __version__

    report = model.__dict__.get("gossamer_report")
    return {
        "gossamer": __version__,
        "layers": {name: _layer(name, layer) for name, layer in packed_layers(model).items()},
        "fused": [name for name, m in model.named_modules() if isinstance(m, FusedActivation)],
        "report": None if report is None else report.to_dict(),
    }


def _layer(name: str, packed: Packed) -> dict[str, Any]:
    layer = matrix_of(packed)
    if isinstance(layer.fmt, Int4Groups):
        raise TargetError(
            f"layer {name!r} holds 4-bit weights, which a folder of transformers cannot give back; use gossamer.save, "
            "or gossamer.unpack(model) first to write them as dense floats"
        )
    meta = layer.fmt.meta()
    options = {key: value for key, value in meta.items() if key not in ("format", "rows", "cols")}
    return {
        "format": meta["format"],
        "options": options,
        "backend": layer.backend,
        "activation": layer.activation,
        "tokens": layer.tokens,
    }


def pack_again(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Pack the layers of a dense model as they were when it was saved, measuring nothing.

    Raises:
        FileDamaged: the record names a layer that is not there, or whose zeros do not fit its format.
    """
    for name, entry in record["layers"].items():
        try:
            put(model, name, _packed(model.get_submodule(name), entry))
        except (AttributeError, FormatError) as error:
            raise FileDamaged(f"layer {name!r} cannot be packed as {entry['format']}: {error}") from error
    for name in record["fused"]:
        put(model, name, FusedActivation(model.get_submodule(name)))
    if record["report"] is not None:
        model.__dict__["gossamer_report"] = PackReport.from_dict(record["report"])
    _plan(model)
    return model


def _packed(dense: nn.Module, entry: Mapping[str, Any]) -> Packed:
    how = {"backend": entry["backend"], "activation": entry["activation"]}
    build = Candidate(entry["format"], tuple(entry["options"].items()), entry["backend"] or "").build
    if isinstance(dense, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return PackedConv2d.from_conv(dense, build, **how)
    return PackedLinear.from_linear(dense, build, tokens=entry["tokens"], **how)
