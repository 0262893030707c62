"""Skeleton: how to build a saved model's modules again, from names in two known places and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.errors import FileDamaged, TargetError, need
from ..nn.conv import PackedConv2d
from ..nn.sliced import record_of, resize
from .tensors import held

VISION = "gossamer.data.vision"


def describe(model: nn.Module) -> dict[str, Any]:
    """What `build` needs; {"kind": "own"} where the model's class must be brought along.

    A description is trusted only after it was tried: the skeleton built from it must hold the same modules.
    """
    name = type(model).__name__
    for read in (_describe_transformers, _describe_vision):
        found = read(model)
        if found is not None and _same_modules(found, model):
            return found
    return {"kind": "own", "class": name}


def build(record: Mapping[str, Any]) -> nn.Module:
    """The modules of a saved model on the meta device: shapes without values.

    Only classes of the transformers package and of gossamer.data.vision are ever made.

    Raises:
        TargetError: the model's class is the user's own; pass `model=`.
        FileDamaged: the record names a class that does not exist there.
    """
    kind = record.get("kind")
    if kind == "transformers":
        return _build_transformers(record)
    if kind == VISION:
        return _build_vision(record)
    raise TargetError(
        f"the saved model is a {record.get('class')!r}, a class of your own, which is never imported from a file; "
        f"make one and pass it: load(path, model={record.get('class')}(...))"
    )


def _describe_transformers(model: nn.Module) -> dict[str, Any] | None:
    config = getattr(model, "config", None)
    if not type(model).__module__.startswith("transformers.") or config is None:
        return None
    generation = getattr(model, "generation_config", None)
    record = {
        "kind": "transformers",
        "class": type(model).__name__,
        "config_class": type(config).__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": getattr(config, "_attn_implementation", None),
        "generation": json.loads(generation.to_json_string(use_diff=False)) if generation is not None else None,
    }
    sliced = record_of(model)
    return record if sliced is None else {**record, "sliced": sliced}


def _build_transformers(record: Mapping[str, Any]) -> nn.Module:
    transformers = need("transformers", "text")
    cls = _class_of(transformers, record.get("class"), transformers.PreTrainedModel)
    config_cls = _class_of(transformers, record.get("config_class"), transformers.PretrainedConfig)
    config = config_cls.from_dict(dict(record["config"]))
    if record.get("attention"):
        config._attn_implementation = record["attention"]
    with torch.device("meta"):
        model = cls(config)
    if record.get("sliced"):
        resize(model, record["sliced"])
    if record.get("generation") and getattr(model, "generation_config", None) is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(dict(record["generation"]))
    return model


def _class_of(package: Any, name: object, family: type) -> type:
    found = getattr(package, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, family)):
        raise FileDamaged(
            f"the record names {name!r}, which is no {family.__name__} of this {package.__name__} "
            f"{getattr(package, '__version__', '')}; install the version it was saved with, or pass model="
        )
    return found


def _describe_vision(model: nn.Module) -> dict[str, Any] | None:
    if not type(model).__module__.startswith(VISION):
        return None
    heads = [m.out_features for m in model.modules() if hasattr(m, "out_features")]
    return {"kind": VISION, "class": type(model).__name__, "classes": heads[-1] if heads else 1000}


def _build_vision(record: Mapping[str, Any]) -> nn.Module:
    from ..data import vision

    cls = _class_of(vision, record.get("class"), nn.Module)
    with torch.device("meta"):
        return cls(classes=int(record["classes"]))


def _same_modules(record: Mapping[str, Any], model: nn.Module) -> bool:
    """True if the skeleton has the model's modules and unpacked tensors, by name and shape."""
    try:
        skeleton = build(record)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, ImportError):
        return False
    inside = {f"{name}.linear" for name, m in model.named_modules() if isinstance(m, PackedConv2d)}
    mine, theirs = {name for name, _ in model.named_modules()}, {name for name, _ in skeleton.named_modules()}
    if mine - inside != theirs:
        return False
    shapes = {h.name: h.tensor.shape for h in held(skeleton)}
    return all(shapes.get(h.name, h.tensor.shape) == h.tensor.shape for h in held(model) if h.kind == "parameter")
