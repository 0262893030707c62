"""Layers: which linear layers and convolutions can be packed, what they are run on, and why the others cannot."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attach.adapted import refuse_adapters
from ..attach.recurrent import RECURRENT
from ..attach.targets import _is_conv1d
from ..core.errors import FormatError, TargetError
from ..core.sparsifier import require_finite
from ..nn.conv import PackedConv2d
from ..nn.linear import PackedLinear
from ..nn.shape import Shape
from .candidates import Candidate
from .convolutions import Convolved, Images, kind_of, pixels
from .examples import Example, call
from .measure import Product

CONVOLUTIONS = (nn.Conv2d, nn.Conv1d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A linear layer or convolution that the examples reached.

    Args:
        name: its dotted name.
        tokens: rows of input, or output pixels of a convolution; one entry per call.
        transposed: the weight is stored [inputs, outputs] (GPT-2's Conv1D).
        images: what a convolution was called with, one entry per call; empty for a linear layer.
    """

    name: str
    tokens: tuple[int, ...]
    transposed: bool = False
    images: tuple[Images, ...] = ()

    def module(self, model: nn.Module) -> nn.Module:
        """The layer itself."""
        return model.get_submodule(self.name)

    def weight(self, model: nn.Module) -> Tensor:
        """The weight as a matrix, outputs first."""
        w = self.module(model).weight.detach()
        return w.t() if self.transposed else w.flatten(1)

    def taps(self, model: nn.Module) -> int:
        """Weights of one kernel; 1 for a linear layer."""
        return math.prod(self.module(model).kernel_size) if self.images else 1

    def work(self, model: nn.Module, activation: str) -> Product | Convolved:
        """What it computes, and on what, with an activation after it."""
        module = self.module(model)
        if self.images:
            return Convolved(module, activation, self.images)
        return Product(self.weight(model), module.bias, activation, self.tokens)

    def packed(self, model: nn.Module, candidate: Candidate, work: Product | Convolved) -> PackedLinear | PackedConv2d:
        """The layer as a candidate stores it."""
        if isinstance(work, Convolved):
            return work.packed(candidate)
        how = {"backend": candidate.backend, "activation": work.activation, "tokens": work.planned_tokens}
        return PackedLinear.from_linear(self.module(model), candidate.build, **how)

    @property
    def dense(self) -> tuple[Candidate, ...]:
        """The dense ways that there are."""
        return Convolved.dense if self.images else Product.dense

    def kind(self, model: nn.Module) -> str:
        """What it is, in words."""
        return kind_of(self.module(model), self.images) if self.images else "linear"


def find_layers(model: nn.Module, examples: Sequence[Example]) -> tuple[tuple[Layer, ...], tuple[tuple[str, str], ...]]:
    """The layers to pack with their numbers of tokens, and those left out with the reason.

    Raises:
        TargetError: a mask is still attached, or a weight is on `meta`.
        NonFiniteError: a weight holds NaN or infinity; the layer is named.
    """
    able, skipped = {}, []
    shared = _shared(model)
    for name, module in model.named_modules():
        if isinstance(module, RECURRENT):
            skipped.append((name, f"{type(module).__name__}: recurrent layers have no packed kernel; they run dense"))
        if not (isinstance(module, (nn.Linear, *CONVOLUTIONS)) or _is_conv1d(module)):
            continue
        reason = _refusal(name, module, shared)
        if reason is None:
            able[name] = module
        else:
            skipped.append((name, reason))
    for name, module in able.items():
        _check(name, module)
    seen = _observe(model, able, examples)
    skipped += [(name, "the example never ran it") for name in able if not seen[name]]
    return tuple(_layer(n, m, tuple(seen[n])) for n, m in able.items() if seen[n]), tuple(skipped)


def _layer(name: str, module: nn.Module, seen: tuple[Images, ...]) -> Layer:
    if isinstance(module, CONVOLUTIONS):
        return Layer(name, tuple(pixels(module, images.shape) for images in seen), images=seen)
    rows = tuple(math.prod(images.shape[:-1]) for images in seen)
    return Layer(name, rows, _is_conv1d(module))


def refuse_masks(model: nn.Module) -> None:
    """Raise if masks of `attach` (or any parametrization) or adapters still sit on weights: these would not be final.

    Raises:
        TargetError: some do; call `handle.remove()` first.
    """
    refuse_adapters(model)
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
    for plain in (nn.Linear, *CONVOLUTIONS):
        if isinstance(module, plain) and type(module) is not plain:
            return f"its class is {type(module).__name__}, which may do more than nn.{plain.__name__}"
    if isinstance(module, CONVOLUTIONS):
        try:
            Shape.of(module)
        except FormatError as error:
            return str(error)
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


def _observe(model: nn.Module, layers: dict[str, nn.Module], examples: Sequence[Example]) -> dict[str, list[Images]]:
    seen: dict[str, list[Images]] = defaultdict(list)

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen[name].append(Images.of(args[0] if args else next(iter(kwargs.values()))))

        return hook

    hooks = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in layers.items()]
    try:
        for example in examples:
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedConv2d]:
    """Every packed layer by name; a convolution counts once, not the matrix inside it as well."""
    inside = {id(m.linear) for m in model.modules() if isinstance(m, PackedConv2d)}
    packed = (PackedLinear, PackedConv2d)
    return {name: m for name, m in model.named_modules() if isinstance(m, packed) and id(m) not in inside}


def matrix_of(layer: PackedLinear | PackedConv2d) -> PackedLinear:
    """The packed matrix of a layer: itself, or that inside a convolution."""
    return layer.linear if isinstance(layer, PackedConv2d) else layer
