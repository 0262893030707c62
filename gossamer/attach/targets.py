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
from .recurrent import RECURRENT, recurrent_weights

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """One prunable weight, held by name: parameters are looked up at each use, for others may swap them.

    Args:
        name: the module's dotted name; of a recurrent layer, which has several weights, with the weight's own after it:
            "lstm.weight_hh_l0".
        transposed: the weight is stored [inputs, outputs] (GPT-2's Conv1D).
        tensor: the weight's own name in its module.
    """

    name: str
    transposed: bool = False
    tensor: str = "weight"

    @property
    def layer(self) -> str:
        """The module's dotted name; a model may be one layer itself, which has no name."""
        return self.name if self.tensor == "weight" else self.name.removesuffix(self.tensor).removesuffix(".")

    @property
    def parameter(self) -> str:
        """The weight's dotted name."""
        return f"{self.layer}.{self.tensor}" if self.layer else self.tensor

    def module(self, model: nn.Module) -> nn.Module:
        """The layer itself."""
        return model.get_submodule(self.layer)

    def stored(self, model: nn.Module) -> Tensor:
        """The weight as the layer stores it and sees it: behind its mask, where it has one."""
        w = getattr(self.module(model), self.tensor)
        if not isinstance(w, Tensor):
            raise TargetError(f"layer {self.name!r} holds no weight tensor, got {type(w).__name__}; skip it")
        return w

    def held(self, model: nn.Module) -> bool:
        """True if the weight is behind a mask or another parametrization."""
        return parametrize.is_parametrized(self.module(model), self.tensor)

    def parametrization(self, model: nn.Module) -> parametrize.ParametrizationList:
        """What a held weight is behind, and its `original`."""
        return self.module(model).parametrizations[self.tensor]  # type: ignore[union-attr, index, return-value]

    def weight(self, model: nn.Module) -> Tensor:
        """The weight with outputs first, as a view: [outputs, inputs, ...]."""
        return self.turned(self.stored(model))

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
    """The weights of linear, convolution and recurrent layers to prune.

    By default: all of them, but not the output head (a layer tied to an embedding, or what
    `get_output_embeddings` returns), which is small in work and dear in quality. A recurrent layer (nn.RNN, nn.GRU,
    nn.LSTM and their cells) has several: of the input, of the hidden state and of its projection, per layer and
    direction.

    Args:
        include: glob patterns over module names, or "re:" + a regular expression; empty = the default. "lstm" is all of
            a recurrent layer, "lstm.weight_hh*" its recurrent weights.
        exclude: the same, taken away again.

    Raises:
        TargetError: a pattern matches no prunable layer (near names listed), nothing is left, or masks are attached.
    """
    layers, stored = dict(_prunable(model)), _stored_sparse(model)
    if not layers:
        _refuse_stored(stored)
        raise TargetError(
            f"{type(model).__name__} has no linear, convolution or recurrent layer; nothing here can be pruned"
        )
    for spec in (*include, *exclude):
        if not any(_named(spec, t) for t in layers):
            here = [name for name in stored if _match(spec, name)]
            if here and spec in exclude:
                continue
            _refuse_stored(here)
            names = [t.name for t in layers]
            raise TargetError(f"target {spec!r} matches none of {len(names)} prunable layers; {near(spec, names)}")
    head = _heads(model)
    kept, skipped, seen = [], [], {}
    for t, module in layers.items():
        parameter = id(_parameter(module, t.tensor))
        reason = _refusal(t, parameter, include, exclude, head, seen)
        if reason:
            skipped.append((t.name, reason))
        else:
            _refuse_masked(model, t)
            seen[parameter] = t.name
            kept.append(t)
    if not kept:
        _refuse_stored(stored)
        raise TargetError(f"every layer is left out: {'; '.join(f'{n}: {r}' for n, r in skipped[:5])}")
    return Found(tuple(kept), (*skipped, *_stacks(model)))


def _stacks(model: nn.Module) -> list[tuple[str, str]]:
    """Weights of experts that are fused into one tensor, as transformers 5 has them: seen, and left alone."""
    return [
        (f"{name}.{key}", f"{w.shape[0]} experts fused into one {list(w.shape)} tensor; only matrices are pruned")
        for name, module in model.named_modules()
        if not isinstance(module, (nn.Linear, *_CONVS))
        for key, w in module.named_parameters(recurse=False)
        if w.ndim == 3 and min(w.shape) > 1
    ]


def sharers(model: nn.Module, target: Target) -> list[tuple[nn.Module, str]]:
    """The target's layer and weight name, and those of every other prunable layer that holds the very same weight."""
    layer = target.module(model)
    if not _tensors(layer):  # a layer that stores its kept weights
        return [(layer, target.tensor)]
    parameter = _parameter(layer, target.tensor)
    return [(m, t.tensor) for t, m in _prunable(model) if _parameter(m, t.tensor) is parameter]


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
    target: Target, parameter: int, include: Sequence[str], exclude: Sequence[str], head: set[int], seen: dict[int, str]
) -> str | None:
    if any(_named(spec, target) for spec in exclude):
        return "excluded by name"
    if include and not any(_named(spec, target) for spec in include):
        return "not among the named targets"
    if not include and parameter in head:
        return "output head or tied to an embedding; name it to include it"
    if parameter in seen:
        return f"tied with {seen[parameter]}, which is pruned once for both"
    return None


def _refuse_masked(model: nn.Module, target: Target) -> None:
    if target.held(model):
        raise TargetError(
            f"layer {target.name!r} still carries a mask or another parametrization; call handle.remove() first"
        )


def _refuse_stored(names: Sequence[str]) -> None:
    if names:
        raise TargetError(
            f"layer {names[0]!r} is held already (a SparseLinear stores its kept weights only); call handle.remove() "
            "first"
        )


def _stored_sparse(model: nn.Module) -> list[str]:
    """Layers that a handle with backend="sparse" holds, or that were sparse from the start."""
    return [name for name, module in model.named_modules() if type(module).__name__ == "SparseLinear"]


def _parameter(module: nn.Module, tensor: str) -> Tensor:
    """The weight's own Parameter: a parametrized weight is a new tensor at every look."""
    masked = parametrize.is_parametrized(module, tensor)
    return module.parametrizations[tensor].original if masked else getattr(module, tensor)


def _prunable(model: nn.Module) -> Iterator[tuple[Target, nn.Module]]:
    for name, module in model.named_modules():
        for tensor in _tensors(module):
            own = name if tensor == "weight" else f"{name}.{tensor}" if name else tensor
            yield Target(own, _is_conv1d(module), tensor), module


def _tensors(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights that a layer multiplies with; none of other modules."""
    if isinstance(module, RECURRENT):
        return recurrent_weights(module)
    return ("weight",) if isinstance(module, (nn.Linear, *_CONVS)) or _is_conv1d(module) else ()


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer with its weight stored [inputs, outputs]; known without importing it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _heads(model: nn.Module) -> set[int]:
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return tied | ({id(output.weight)} if output is not None else set())


def _named(spec: str, target: Target) -> bool:
    """By its own name, or by its layer's."""
    return _match(spec, target.name) or _match(spec, target.layer)


def _match(spec: str, name: str) -> bool:
    if spec.startswith("re:"):
        return re.search(spec[3:], name) is not None
    return fnmatch.fnmatchcase(name, spec)
