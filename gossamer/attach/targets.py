"""Targets: which weights of a model are made sparse, found by name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.errors import TargetError, near

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """One prunable layer, held by name: parameters are looked up at each use, for others may swap them.

    Args:
        name: the module's dotted name.
        transposed: the weight is stored [inputs, outputs] (GPT-2's Conv1D).
    """

    name: str
    transposed: bool = False

    @property
    def parameter(self) -> str:
        """The weight's dotted name; a model may be one layer itself, which has no name."""
        return f"{self.name}.weight" if self.name else "weight"

    def module(self, model: nn.Module) -> nn.Module:
        """The layer itself."""
        return model.get_submodule(self.name)

    def weight(self, model: nn.Module) -> Tensor:
        """The weight with outputs first, as a view: [outputs, inputs, ...]."""
        w = self.module(model).weight
        if not isinstance(w, Tensor):
            raise TargetError(f"layer {self.name!r} holds no weight tensor, got {type(w).__name__}; skip it")
        return self.turned(w)

    def turned(self, x: Tensor) -> Tensor:
        """From the layout of storage to outputs first, or back."""
        return x.t() if self.transposed else x

    def write(self, model: nn.Module, w: Tensor) -> None:
        """Copy new values into the layer, keeping the parameter, its dtype and its memory layout."""
        with torch.no_grad():
            self.weight(model).copy_(w)


@dataclass(frozen=True)
class Found:
    """Targets, and the layers left out with the reason for each."""

    targets: tuple[Target, ...]
    skipped: tuple[tuple[str, str], ...]


def find(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Found:
    """The linear and convolution layers to prune.

    By default: all of them, but not the output head (a layer tied to an embedding, or what
    `get_output_embeddings` returns), which is small in work and dear in quality.

    Args:
        include: glob patterns over module names, or "re:" + a regular expression; empty = the default.
        exclude: the same, taken away again.

    Raises:
        TargetError: a pattern matches no prunable layer (near names listed), nothing is left, or masks are attached.
    """
    layers, stored = dict(_prunable(model)), _stored_sparse(model)
    if not layers:
        _refuse_stored(stored)
        raise TargetError(f"{type(model).__name__} has no linear or convolution layer; nothing here can be pruned")
    for spec in (*include, *exclude):
        if not any(_match(spec, name) for name in layers):
            here = [name for name in stored if _match(spec, name)]
            if here and spec in exclude:
                continue
            _refuse_stored(here)
            raise TargetError(f"target {spec!r} matches none of {len(layers)} prunable layers; {near(spec, layers)}")
    head = _heads(model)
    kept, skipped, seen = [], [], {}
    for name, module in layers.items():
        reason = _refusal(name, module, include, exclude, head, seen)
        if reason:
            skipped.append((name, reason))
        else:
            _refuse_masked(name, module)
            seen[id(_parameter(module))] = name
            kept.append(Target(name, transposed=_is_conv1d(module)))
    if not kept:
        _refuse_stored(stored)
        raise TargetError(f"every layer is left out: {'; '.join(f'{n}: {r}' for n, r in skipped[:5])}")
    return Found(tuple(kept), tuple(skipped))


def sharers(model: nn.Module, target: Target) -> list[nn.Module]:
    """The target's layer, and every other linear or convolution layer that holds the very same weight."""
    layer = target.module(model)
    if not isinstance(layer, (nn.Linear, *_CONVS)) and not _is_conv1d(layer):  # a layer that stores its kept weights
        return [layer]
    return [m for _, m in _prunable(model) if _parameter(m) is _parameter(layer)]


def refuse_foreign(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Raise if the optimizer does not train these weights: another model's, or built before a copy."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    foreign = [n for n, w in weights.items() if w.requires_grad and id(w) not in owned]
    if foreign:
        raise TargetError(
            f"the optimizer does not own the weights of {len(foreign)} of {len(weights)} layers "
            f"({', '.join(foreign[:3])}); build it from this model's parameters, or skip= these layers"
        )


def slots(optimizer: torch.optim.Optimizer | None, weight: Tensor) -> Iterator[Tensor]:
    """What the optimizer holds in the weight's shape: momentum, both moments of Adam."""
    state = optimizer.state.get(weight, {}) if optimizer is not None else {}
    yield from (slot for slot in state.values() if isinstance(slot, Tensor) and slot.shape == weight.shape)


def _refusal(
    name: str, module: nn.Module, include: Sequence[str], exclude: Sequence[str], head: set[int], seen: dict[int, str]
) -> str | None:
    if any(_match(spec, name) for spec in exclude):
        return "excluded by name"
    if include and not any(_match(spec, name) for spec in include):
        return "not among the named targets"
    if not include and id(_parameter(module)) in head:
        return "output head or tied to an embedding; name it to include it"
    if id(_parameter(module)) in seen:
        return f"tied with {seen[id(_parameter(module))]}, which is pruned once for both"
    return None


def _refuse_masked(name: str, module: nn.Module) -> None:
    if parametrize.is_parametrized(module, "weight"):
        raise TargetError(f"layer {name!r} still carries a mask or another parametrization; call handle.remove() first")


def _refuse_stored(names: Sequence[str]) -> None:
    if names:
        raise TargetError(
            f"layer {names[0]!r} is held already (a SparseLinear stores its kept weights only); call handle.remove() "
            "first"
        )


def _stored_sparse(model: nn.Module) -> list[str]:
    """Layers that a handle with backend="sparse" holds, or that were sparse from the start."""
    return [name for name, module in model.named_modules() if type(module).__name__ == "SparseLinear"]


def _parameter(module: nn.Module) -> Tensor:
    """The weight's own Parameter: a parametrized `weight` is a new tensor at every look."""
    masked = parametrize.is_parametrized(module, "weight")
    return module.parametrizations.weight.original if masked else module.weight


def _prunable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *_CONVS)) or _is_conv1d(module):
            yield name, module


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer with its weight stored [inputs, outputs]; known without importing it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _heads(model: nn.Module) -> set[int]:
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return tied | ({id(output.weight)} if output is not None else set())


def _match(spec: str, name: str) -> bool:
    if spec.startswith("re:"):
        return re.search(spec[3:], name) is not None
    return fnmatch.fnmatchcase(name, spec)
