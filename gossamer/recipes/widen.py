"""Widen: a network with more channels between its layers, newly drawn, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..core.errors import TargetError
from .channels import Space


@dataclass
class _Sizes:
    """New numbers of outputs, inputs and kept channels, by layer."""

    outputs: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    keepers: dict[str, int] = field(default_factory=dict)


def widened(model: nn.Module, found: Sequence[Space], allowed: set[str], factor: float) -> set[str]:
    """Replace layers so that round(factor·n) channels stand where n were, wherever all layers beside are `allowed`.

    Args:
        found: the network's numberings of channels, of `channels.spaces`.
        allowed: linear and convolution layers that may be replaced; norms between them are, as need be.
        factor: above 1.

    Returns:
        The linear and convolution layers that were replaced.

    Raises:
        TargetError: no numbering can be widened; the message says why.
    """
    sizes, refused = _Sizes(), []
    for space in found:
        if reason := _refusal(model, space, allowed):
            refused.append(f"{', '.join(space.writers) or 'the input'}: {reason}")
            continue
        size = round(factor * space.size)
        sizes.outputs |= dict.fromkeys(space.writers, size)
        sizes.inputs |= {name: repeat * size for name, repeat in space.readers}
        sizes.keepers |= dict.fromkeys(space.keepers, size)
    if not sizes.outputs:
        raise TargetError(f"no layer of {type(model).__name__} can be made wider ({'; '.join(refused[:4])})")
    for name in {**sizes.outputs, **sizes.inputs, **sizes.keepers}:
        _replace(model, name, sizes)
    return {*sizes.outputs, *sizes.inputs, *(n for n in sizes.keepers if _multiplies(model, n))}


def _refusal(model: nn.Module, space: Space, allowed: set[str]) -> str:
    if space.fixed or not space.writers:
        return space.fixed or "no layer writes it"
    layers = [*space.writers, *(n for n, _ in space.readers), *(n for n in space.keepers if _multiplies(model, n))]
    beside = [n for n in layers if n not in allowed]
    return f"{', '.join(beside[:3])} is to stay as it is" if beside else ""


def _multiplies(model: nn.Module, name: str) -> bool:
    """False for norms."""
    return model.get_submodule(name).weight is not None and model.get_submodule(name).weight.ndim > 1


def _replace(model: nn.Module, name: str, sizes: _Sizes) -> None:
    old = model.get_submodule(name)
    new = _norm(old, sizes.keepers[name]) if not _multiplies(model, name) else _layer(old, name, sizes)
    model.set_submodule(name, new.train(old.training))


def _layer(old: nn.Module, name: str, sizes: _Sizes) -> nn.Module:
    where: Mapping[str, object] = {"device": old.weight.device, "dtype": old.weight.dtype}
    bias = old.bias is not None
    if isinstance(old, nn.Linear):
        sides = sizes.inputs.get(name, old.in_features), sizes.outputs.get(name, old.out_features)
        return nn.Linear(*sides, bias=bias, **where)
    kept = sizes.keepers.get(name)  # a depthwise convolution has one filter per channel
    sides = kept or sizes.inputs.get(name, old.in_channels), kept or sizes.outputs.get(name, old.out_channels)
    geometry = {n: getattr(old, n) for n in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    return type(old)(*sides, **geometry, groups=kept or 1, bias=bias, **where)


def _norm(old: nn.Module, size: int) -> nn.Module:
    like = old.weight if old.affine else old.running_mean
    where = {"device": like.device, "dtype": like.dtype} if like is not None else {}
    return type(old)(size, old.eps, old.momentum, old.affine, old.track_running_stats, **where)
