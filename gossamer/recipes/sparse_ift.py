"""Sparse-IFT: larger layers with so many zeros that they multiply as often as the dense layers they replace.

Shape suffixes: I inputs, O outputs, K kernel entries (1 for linear layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..attach.targets import find, sharers
from ..core.errors import BudgetError, TargetError, unknown
from ..nn.branches import Sum
from .channels import spaces
from .widen import widened

Norm = Callable[[int], nn.Module]


@dataclass(frozen=True)
class IsoLayer:
    """One layer that was replaced. Counts are weights, each multiplied once per position of the layer's output.

    Args:
        name: of the layer that was there.
        dense: what it had, I·O·K.
        parts: what each new layer to be made sparse may keep of what it has: name → (kept, size).
        fixed: weights of new layers that stay dense.
    """

    name: str
    dense: int
    parts: Mapping[str, tuple[int, int]]
    fixed: int = 0

    @property
    def kept(self) -> int:
        """What the new layers multiply with in all; equals `dense`."""
        return self.fixed + sum(kept for kept, _ in self.parts.values())


@dataclass(frozen=True)
class IsoFlop:
    """What `sparse_ift` did.

    Args:
        layers: every replacement.
        skipped: layers left as they are, with the reason.
    """

    layers: tuple[IsoLayer, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def densities(self) -> dict[str, float]:
        """The density of every layer to be made sparse, which is what `attach` takes as targets= and allocation=."""
        return {name: kept / size for layer in self.layers for name, (kept, size) in layer.parts.items()}


def sparse_ift(
    model: nn.Module,
    family: str,
    example: Tensor | None = None,
    *,
    density: float = 0.25,
    norm: Norm | None = None,
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> IsoFlop:
    """Replace layers of an untrained model, in place, by larger ones that at `density` cost the same FLOPs.

    With d the density and N = I·O·K the dense layer's weights:

    - "wide": √(1/d) times as many channels between layers, y = W′x with W′ of about N/d weights.
    - "parallel": round(1/d) branches, y = Σ_j norm(W_j·x), each as large as W.
    - "factorized": y = V·relu(norm(U·x)), U to r = ⌈N/(d·(I·K + O))⌉ channels, V back by 1×1.
    - "doped": y = W·x + V·U·x, U and V dense of rank r = ⌊(1 − d)·N/(I·K + O)⌋, W sparse.

    Of the layers that become sparse as many weights are to be kept as make N with those that stay dense, so the FLOPs
    are those of before to the last multiplication: `attach(model, "rigl", targets=done.densities,
    allocation=done.densities, ...)`. Norms, activations and additions are not counted. New layers start by torch's
    defaults, drawn from its global generator.

    Args:
        family: one of the four.
        example: an input, for "wide", which follows channels through the network.
        density: d, above 0 and below 1.
        norm: what "parallel" and "factorized" put behind a product, from its number of outputs; a batch norm for
            convolutions, a layer norm for linear layers unless given.
        targets, skip: layers, as for `gossamer.attach`. The paper leaves first and last layers as they are.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
        >>> done = sparse_ift(net, "wide", torch.ones(1, 4, 8, 8), density=0.25)
        >>> net[0].out_channels, done.densities
        (16, {'0': 0.5, '2': 0.5})

    Raises:
        UnknownName: no such family.
        BudgetError: the density is not between 0 and 1.
        TargetError: nothing is left to replace, "wide" has no example or cannot follow the network, or the layer is
            the model itself.

    Reference: Thangarasa et al., Sparse Iso-FLOP Transformations for Maximizing Training Efficiency, arXiv:2303.11525.
    Departs from: where rounding gives a layer more weights than N/d, it is made sparser, and layers widened on one side
        only, as the first and the last, are made sparse at √d, so that FLOPs match exactly; the official code keeps the
        latter dense and the density at d. By reading, it also prunes the low-rank part of "doped".
    """
    if family not in (*_FAMILIES, "wide"):
        raise unknown("family", family, (*_FAMILIES, "wide"))
    if not 0.0 < density < 1.0:
        raise BudgetError(f"density is the fraction kept of the larger layers, above 0 and below 1, got {density:g}")
    if family == "parallel" and round(1.0 / density) < 2:
        raise BudgetError(f"at density {density:g} there is no second branch to pay for; take a half or less")
    found = find(model, tuple(targets) or ("*",), tuple(skip))
    if family == "wide":
        return _wide(model, [t.name for t in found.targets if t.tensor == "weight"], example, density)
    layers, skipped = [], list(found.skipped)
    for t in found.targets:
        layer = t.module(model)
        if reason := _refusal(layer, model, len(sharers(model, t)), family, density):
            skipped.append((t.name, reason))
            continue
        new, parts, fixed = _FAMILIES[family](layer, density, norm or _norm_for(layer))
        model.set_submodule(t.name, new.train(layer.training))
        layers.append(IsoLayer(t.name, layer.weight.numel(), {f"{t.name}.{n}": p for n, p in parts.items()}, fixed))
    if not layers:
        why = "; ".join(f"{n or type(model).__name__}: {r}" for n, r in skipped[:5])
        raise TargetError(f"no layer can be replaced ({why})")
    return IsoFlop(tuple(layers), tuple(skipped))


Parts = dict[str, tuple[int, int]]


def _parallel(layer: nn.Module, density: float, norm: Norm) -> tuple[nn.Module, Parts, int]:
    number = max(round(1.0 / density), 1)
    outputs = layer.weight.shape[0]
    branches = Sum(nn.Sequential(_like(layer, bias=False), norm(outputs)) for _ in range(number))
    return branches, _shared({f"{j}.0": layer.weight.numel() for j in range(number)}, layer.weight.numel()), 0


def _factorized(layer: nn.Module, density: float, norm: Norm) -> tuple[nn.Module, Parts, int]:
    n, per_rank = layer.weight.numel(), _per_rank(layer)
    rank = math.ceil(n / (density * per_rank))
    down, up = _like(layer, outputs=rank, bias=False), _pointwise(layer, rank, bias=layer.bias is not None)
    sizes = {"0": down.weight.numel(), "3": up.weight.numel()}
    return nn.Sequential(down, norm(rank), nn.ReLU(), up), _shared(sizes, n), 0


def _doped(layer: nn.Module, density: float, norm: Norm) -> tuple[nn.Module, Parts, int]:
    n, rank = layer.weight.numel(), _low_rank(layer, density)
    low = nn.Sequential(_like(layer, outputs=rank, bias=False), _pointwise(layer, rank, bias=False))
    sparse = _like(layer, bias=layer.bias is not None)
    return Sum((sparse, low)), {"0": (n - rank * _per_rank(layer), n)}, rank * _per_rank(layer)


def _low_rank(layer: nn.Module, density: float) -> int:
    return math.floor((1.0 - density) * layer.weight.numel() / _per_rank(layer))


_FAMILIES = {"parallel": _parallel, "factorized": _factorized, "doped": _doped}


def _wide(model: nn.Module, names: list[str], example: Tensor | None, density: float) -> IsoFlop:
    if example is None:
        raise TargetError("family 'wide' follows channels from layer to layer; pass an example input")
    before = {name: model.get_submodule(name).weight.numel() for name in names}
    changed = widened(model, spaces(model, example), set(names), math.sqrt(1.0 / density))
    size = lambda name: model.get_submodule(name).weight.numel()
    layers = tuple(IsoLayer(n, before[n], {n: (before[n], size(n))}) for n in names if n in changed)
    return IsoFlop(layers, tuple((n, "no channels beside it can be widened") for n in names if n not in changed))


def _shared(sizes: Mapping[str, int], total: int) -> Parts:
    """`total` weights spread evenly: every part gets its share, and the first ones what rounding leaves over."""
    whole = sum(sizes.values())
    kept = {name: size * total // whole for name, size in sizes.items()}
    for name in list(sizes)[: total - sum(kept.values())]:
        kept[name] += 1
    return {name: (kept[name], size) for name, size in sizes.items()}


def _per_rank(layer: nn.Module) -> int:
    """I·K + O: what one more channel in the middle costs."""
    outputs = layer.weight.shape[0]
    return layer.weight.numel() // outputs + outputs


def _like(layer: nn.Module, *, outputs: int | None = None, bias: bool) -> nn.Module:
    """A new layer of the same geometry."""
    o, where = outputs or layer.weight.shape[0], {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, o, bias=bias, **where)
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return type(layer)(layer.in_channels, o, **{n: getattr(layer, n) for n in names}, bias=bias, **where)


def _pointwise(layer: nn.Module, inputs: int, *, bias: bool) -> nn.Module:
    """From `inputs` channels to the layer's outputs, place by place."""
    o, where = layer.weight.shape[0], {"device": layer.weight.device, "dtype": layer.weight.dtype}
    sides = (inputs, o) if isinstance(layer, nn.Linear) else (inputs, o, 1)
    return type(layer)(*sides, bias=bias, **where)


_NORMS = {nn.Linear: nn.LayerNorm, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


def _norm_for(layer: nn.Module) -> Norm:
    return lambda outputs: _NORMS[type(layer)](outputs, device=layer.weight.device, dtype=layer.weight.dtype)


def _refusal(layer: nn.Module, model: nn.Module, uses: int, family: str, density: float) -> str:
    if layer is model:
        return "is the whole model, which cannot be replaced in place"
    if type(layer) not in _NORMS:
        return f"is a {type(layer).__name__}"
    if uses > 1:
        return "shares its weight with another layer"
    if family != "parallel" and getattr(layer, "groups", 1) > 1:
        return "is a grouped convolution, whose channels one low rank would mix"
    if family == "doped" and _low_rank(layer, density) == 0:
        return f"has room for no low-rank part at density {density:g}"
    return ""
