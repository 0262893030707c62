"""Layers: which linear layers of a model can be packed, what they are run on, and why the others cannot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attach.targets import _is_conv1d
from ..core.errors import TargetError
from ..core.sparsifier import require_finite
from ..nn.linear import PackedLinear
from .examples import Example, call


@dataclass(frozen=True)
class Layer:
    """A linear layer that the examples reached.

    Args:
        name: its dotted name.
        tokens: rows of input, one entry per call.
        transposed: the weight is stored [inputs, outputs] (GPT-2's Conv1D).
    """

    name: str
    tokens: tuple[int, ...]
    transposed: bool

    def module(self, model: nn.Module) -> nn.Module:
        """The layer itself."""
        return model.get_submodule(self.name)

    def weight(self, model: nn.Module) -> Tensor:
        """The weight, outputs first."""
        w = self.module(model).weight.detach()
        return w.t() if self.transposed else w


def find_layers(model: nn.Module, examples: Sequence[Example]) -> tuple[tuple[Layer, ...], tuple[tuple[str, str], ...]]:
    """The layers to pack with their numbers of tokens, and those left out with the reason.

    Raises:
        TargetError: a mask is still attached, or a weight is on `meta`.
        NonFiniteError: a weight holds NaN or infinity; the layer is named.
    """
    able, skipped = {}, []
    shared = _shared(model)
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
            continue
        reason = _refusal(name, module, shared)
        if reason is None:
            able[name] = module
        else:
            skipped.append((name, reason))
    for name, module in able.items():
        _check(name, module)
    tokens = _observe(model, able, examples)
    skipped += [(name, "the example never ran it") for name in able if not tokens[name]]
    layers = [Layer(n, tuple(tokens[n]), _is_conv1d(m)) for n, m in able.items() if tokens[n]]
    return tuple(layers), tuple(skipped)


def refuse_masks(model: nn.Module) -> None:
    """Raise if masks of `attach` (or any parametrization) still sit on weights: what is stored would not be final.

    Raises:
        TargetError: some do; call `handle.remove()` first.
    """
    masked = [name for name, m in model.named_modules() if hasattr(m, "parametrizations")]
    if masked:
        raise TargetError(
            f"{len(masked)} layers still carry masks or other parametrizations ({', '.join(masked[:3])}...); "
            "call handle.remove() first, it writes the zeros into the weights"
        )


def _shared(model: nn.Module) -> set[int]:
    """Ids of weights, and of modules, that stand in more than one place."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {i for i, n in (places + owners).items() if n > 1}


def _refusal(name: str, module: nn.Module, shared: set[int]) -> str | None:
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"its class is {type(module).__name__}, which may do more than nn.Linear"
    if id(module) in shared:
        return "the same layer stands in several places"
    if id(module.weight) in shared:
        return "its weight is shared with another layer, such as an embedding"
    if module.weight.is_floating_point() is False:
        return f"its weight is {module.weight.dtype}, not floating point"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return "it carries forward hooks, which packing would drop"
    return "it is empty" if 0 in module.weight.shape else None


def _check(name: str, module: nn.Module) -> None:
    if module.weight.is_meta:
        raise TargetError(f"layer {name!r} is on the meta device and has no values; load the weights first")
    w = module.weight.detach()
    # NaN and infinity show in the extremes, which is one reading; the count is for the message.
    if not bool(torch.stack(w.aminmax()).isfinite().all()):
        require_finite(w, f"the weight of layer {name!r}")


def _observe(model: nn.Module, layers: dict[str, nn.Module], examples: Sequence[Example]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = defaultdict(list)

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            tokens[name].append(x.numel() // max(x.shape[-1], 1))

        return hook

    hooks = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in layers.items()]
    try:
        for example in examples:
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return tokens


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed layer by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
