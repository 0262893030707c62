"""Adapted: a layer that carries deltas. Its weight stays what and where it was.

A parametrization would need the gradient of the whole weight; here the layer's class gets a `forward` of its own, so
that a delta may compute its product without one. Names in `state_dict` stay, and deltas come beside them.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import TargetError
from .delta import Delta
from .merging import Undo
from .targets import Target, sharers

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# These read the weights of their linear layers themselves and never call them.
_SELF_SERVING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Adapted:
    """Mixed in before a layer's own class: y = layer(x) with w + Σ factor·delta in the weight's place.

    `deltas` holds them by adapter; `uses` says which count, and by how much; while `undo` is set they are merged.
    """

    deltas: nn.ModuleDict
    uses: dict[str, float]
    undo: Undo | None

    def forward(self, x: Tensor) -> Tensor:
        if not self.uses or self.undo is not None:
            return super().forward(x)
        y = _alone(self, x)
        return _product(self, x, turned(self, changed(self))) if y is None else y


def put_on(model: nn.Module, target: Target, name: str, delta: Delta) -> None:
    """The weight's layer, and every layer tied to it, carries the delta under this adapter's name."""
    refuse_unfit(model, target)
    for layer, _ in sharers(model, target):
        if not isinstance(layer, Adapted):
            layer.__class__ = _class(type(layer))
            layer.deltas, layer.uses, layer.undo = nn.ModuleDict(), {}, None
        layer.deltas[name] = delta.to(layer.weight.device)


def take_off(layer: nn.Module) -> None:
    """The layer is of its own class again, with the weight as it stands."""
    for name in ("deltas", "uses", "undo"):
        delattr(layer, name)
    layer.__class__ = type(layer).__mro__[2]


def refuse_adapters(model: nn.Module) -> None:
    """Raise where weights are read as they stand, and what adapters add to them would be lost.

    Raises:
        TargetError: layers carry adapters.
    """
    adapted = [name for name, m in model.named_modules() if isinstance(m, Adapted)]
    if adapted:
        raise TargetError(
            f"{len(adapted)} layers carry adapters ({', '.join(adapted[:3])}...); call merge() of their handle, if "
            "they are to stay, and remove() first"
        )


@cache
def _class(own: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{own.__name__}", (Adapted, own), {"__module__": __name__})


def refuse_unfit(model: nn.Module, target: Target) -> None:
    """Raise where a delta would not be seen.

    Raises:
        TargetError: a recurrent layer, one whose forward another library replaced, one that its parent does not call,
            or a weight that an embedding shares.
    """
    layer = target.module(model)
    parent = model.get_submodule(target.layer.rpartition(".")[0])
    if target.tensor != "weight":
        reason = "is recurrent, and its cell reads the weights itself"
    elif "forward" in layer.__dict__:
        reason = "has a forward that another library replaced"
    elif isinstance(parent, _SELF_SERVING) or type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        reason = f"is not called by its {type(parent).__name__}, which reads its weight"
    elif any(m.weight is layer.weight for m in model.modules() if isinstance(m, nn.Embedding)):
        reason = "shares its weight with an embedding, which would not see the change"
    else:
        return
    raise TargetError(f"layer {target.name!r} {reason}; a change of it would be lost, skip= it")


def turned(layer: nn.Module, w: Tensor) -> Tensor:
    """From the layer's layout to outputs first, or back: transformers' Conv1D stores [inputs, outputs]."""
    return w if isinstance(layer, (nn.Linear, *_CONVS)) else w.t()


def changed(layer: Adapted) -> Tensor:
    """The weight as it is used, outputs first: w + Σ factor·effect."""
    w = turned(layer, layer.weight)
    for name, factor in layer.uses.items():
        effect = layer.deltas[name].effect(w)
        w = w + (effect if factor == 1 else factor * effect)
    return w


def _alone(layer: Adapted, x: Tensor) -> Tensor | None:
    """The product by the one delta in use, if that has a way of its own."""
    (name, factor), *others = layer.uses.items()
    delta: Delta = layer.deltas[name]
    if others or factor != 1 or delta.keep_zeros or isinstance(layer, _CONVS):
        return None
    return delta.product(x, turned(layer, layer.weight), layer.bias)


def _product(layer: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    if isinstance(layer, _CONVS):
        return layer._conv_forward(x, w, layer.bias)
    return functional.linear(x, turned(layer, w), layer.bias)
