"""Adapter files: the small numbers as safetensors, the rest as JSON, under the names that peft gives its own.

Adapters that are low-rank products can be written as peft's LoRA, which peft and what reads its files then load; LoRA
files of peft load here. Files of other kinds are gossamer's alone, and say so in `peft_type`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.errors import FileDamaged, TargetError
from ..core.files import digest, whole_file
from .adapted import put_on, turned
from .delta import Delta, kind
from .low_rank import LowRank
from .targets import find

if TYPE_CHECKING:
    from .adapters import Adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OURS, PEFT_LORA = "GOSSAMER", "LORA"
PREFIX = "base_model.model."


def save(handle: Adapters, path: str | Path, name: str, *, peft: bool) -> Path:
    """See `Adapters.save`."""
    from safetensors.torch import save_file

    path, deltas = Path(path), handle.deltas(name)
    tensors, config = _as_lora(handle, deltas) if peft else _as_ours(handle, name, deltas)
    base = getattr(getattr(handle.model, "config", None), "_name_or_path", None)
    with whole_file(path / TENSORS) as draft:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, draft)
    config |= {"base_model_name_or_path": base, "sha256": digest(path / TENSORS)}
    with whole_file(path / CONFIG) as draft:
        draft.write_text(json.dumps(config, indent=1, default=str) + "\n")
    return path


def load(handle: Adapters, path: str | Path, name: str) -> None:
    """See `Adapters.load`."""
    handle.refuse_name(name)
    config, tensors = _read(Path(path))
    if config["peft_type"] == OURS:
        deltas = {at: _built(record, tensors, at) for at, record in config["layers"].items()}
    else:
        deltas = _from_lora(config, tensors)
    _put(handle.model, name, deltas)
    handle.settings[name] = config.get("settings", {"method": "lora", "options": {}})
    _restore(handle, {k.removeprefix("also:"): t for k, t in tensors.items() if k.startswith("also:")})


def _as_ours(handle: Adapters, name: str, deltas: Mapping[str, Delta]) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {f"{at}.{part}": t for at, d in deltas.items() for part, t in d.state_dict().items()}
    tensors |= {f"also:{own}": handle.model.get_parameter(own) for own in handle.also}
    layers = {
        at: {"kind": d.kind, "constants": d.constants(), "keep_zeros": d.keep_zeros, "tensors": list(d.state_dict())}
        for at, d in deltas.items()
    }
    return tensors, {
        "peft_type": OURS,
        "target_modules": list(deltas),
        "layers": layers,
        "settings": handle.settings[name],
    }


def _as_lora(handle: Adapters, deltas: Mapping[str, Delta]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The products B·A, with a factor of 1, so that α = r in every layer."""
    if handle.also:
        raise TargetError(f"peft's LoRA file has no place for {', '.join(handle.also[:3])}; save them yourself")
    tensors, ranks = {}, {}
    for at, delta in deltas.items():
        layer = handle.model.get_submodule(at)
        product = None if delta.keep_zeros else delta.low_rank(turned(layer, layer.weight))
        if product is None:
            raise TargetError(
                f"the change of layer {at!r} is no thin product, so peft's LoRA cannot hold it; peft=False"
            )
        B_OR, A_RI = product
        tensors |= {f"{PREFIX}{at}.lora_A.weight": A_RI, f"{PREFIX}{at}.lora_B.weight": B_OR}
        ranks[at] = len(A_RI)
    rank = max(ranks.values())
    return tensors, {
        "peft_type": PEFT_LORA,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {re.escape(at): r for at, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(at): r for at, r in ranks.items() if r != rank},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(type(handle.model.get_submodule(at)).__name__ == "AdaptedConv1D" for at in ranks),
    }


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config, tensors = json.loads((path / CONFIG).read_text()), load_file(path / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise FileDamaged(f"{path} holds no readable adapter ({error}); it needs {CONFIG} and {TENSORS}") from error
    if config.get("sha256", digest(path / TENSORS)) != digest(path / TENSORS):
        raise FileDamaged(f"{path / TENSORS} is not the file that {CONFIG} was written with; copy both again")
    if config.get("peft_type") not in (OURS, PEFT_LORA):
        raise TargetError(
            f"{path} holds an adapter of type {config.get('peft_type')!r}; gossamer reads {OURS}, {PEFT_LORA}"
        )
    return config, tensors


def _built(record: Mapping, tensors: Mapping[str, Tensor], at: str) -> Delta:
    parts = {part: tensors[f"{at}.{part}"] for part in record["tensors"]}
    steps = parts.pop("steps")
    delta = kind(record["kind"])(**parts, **record["constants"])
    delta.load_state_dict({"steps": steps}, strict=False)
    delta.keep_zeros = record["keep_zeros"]
    return delta


def _from_lora(config: Mapping, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """Of a LoRA file by peft, plain or with rsLoRA's factor."""
    odd = [k for k in tensors if not re.search(r"\.lora_[AB]\.weight$", k)]
    if odd or config.get("use_dora"):
        raise TargetError(
            f"this LoRA file holds more than two plain matrices per layer ({odd[:2]}); merge it with peft"
        )
    layers = sorted({k.removeprefix(PREFIX).rsplit(".", 2)[0] for k in tensors})
    return {at: _lora(config, at, *(tensors[f"{PREFIX}{at}.lora_{m}.weight"] for m in "AB")) for at in layers}


def _lora(config: Mapping, at: str, A_RI: Tensor, B_OR: Tensor) -> LowRank:
    alpha = _by_name(config.get("alpha_pattern"), at, config["lora_alpha"])
    rank = len(A_RI)
    return LowRank(A_RI, B_OR, scale=alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _by_name(patterns: Mapping[str, float] | None, at: str, usual: float) -> float:
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", at)), usual)


@torch.no_grad()
def _put(model: nn.Module, name: str, deltas: Mapping[str, Delta]) -> None:
    targets = find(model, tuple(deltas)).targets
    for target in targets:
        try:
            deltas[target.name].to(target.stored(model).device).change(target.weight(model))
        except (RuntimeError, IndexError) as error:
            raise TargetError(f"the adapter does not fit layer {target.name!r} of this model: {error}") from error
    for target in targets:
        put_on(model, target, name, deltas[target.name])


@torch.no_grad()
def _restore(handle: Adapters, own: Mapping[str, Tensor]) -> None:
    """What learnt beside the deltas is there once, whatever adapter is in use."""
    for name, values in own.items():
        handle.model.get_parameter(name).copy_(values)
    handle.also = tuple(dict.fromkeys([*handle.also, *own]))
