"""A checkpoint of a held model loads into the bare one: its weights now, its masks when the model is held again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from ..formats import CSR

_WEIGHT = "parametrizations.weight."
_MASKED = frozenset({_WEIGHT + "original", _WEIGHT + "0.mask"})
_WIRED = frozenset(CSR.PARTS)
_HELD = re.compile(rf"(.*)\.({re.escape(_WEIGHT)}(?:original|0\.\w+)|{'|'.join(CSR.PARTS)})")
_NAME = "_gossamer_brought"


class Brought:
    """What a model's checkpoints brought that only its held layers have a place for: the parts of each layer by name.

    A checkpoint of a held model names `layer.parametrizations.weight.original` and its mask, or `layer.values` and
    their places. The bare model has `layer.weight`: it gets the values with zeros where nothing is kept, so that it
    can be evaluated. The parts may come in several loads, as from a checkpoint in shards; the last one sets the weight.
    """

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def to(cls, model: nn.Module) -> Self:
        """From now on checkpoints of the held model load into this one; a model has one of these, empty at each call.

        Two would take the parts from each other.
        """
        brought = getattr(model, _NAME, None)
        if brought is None:
            brought = cls()
            model.register_load_state_dict_pre_hook(brought._translate)
            setattr(model, _NAME, brought)
        brought.layers.clear()
        return brought

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """A copied or pickled model takes no parts along."""
        return type(self), ()

    @property
    def complete(self) -> bool:
        """Something came, and no layer's parts are missing."""
        return bool(self.layers) and all(map(_complete, self.layers.values()))

    def state(self) -> dict[str, Tensor]:
        """All parts, as a held model names them."""
        return {f"{name}.{part}": x for name, parts in self.layers.items() for part, x in parts.items()}

    def _translate(self, model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        """Set aside what only a held layer has, and give the bare one a weight."""
        modules = dict(model.named_modules(remove_duplicate=False))
        arrived: dict[str, dict[str, Tensor]] = {}
        for key in list(state):
            found = _HELD.fullmatch(key, len(prefix)) if key.startswith(prefix) else None
            layer = modules.get(found[1]) if found else None
            if hasattr(layer, "weight") and not hasattr(layer, found[2].split(".")[0]):  # ours, and not held already
                arrived.setdefault(found[1], {})[found[2]] = state.pop(key).clone()
        for name, parts in arrived.items():
            held = self.layers.setdefault(name, {})
            if held.keys() & parts.keys():
                held.clear()  # another checkpoint's
            held.update(parts)
            if _complete(held):
                state[f"{prefix}{name}.weight"] = _dense(held, modules[name].weight.shape)


def _complete(parts: Mapping[str, Tensor]) -> bool:
    return parts.keys() >= _MASKED or parts.keys() >= _WIRED


def _dense(parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The weight that is left when the masks are taken away."""
    if parts.keys() >= _MASKED:
        return parts[_WEIGHT + "original"].masked_fill(~parts[_WEIGHT + "0.mask"], 0)
    return CSR.from_parts({name: parts[name] for name in _WIRED}, dict(zip(("rows", "cols"), shape))).to_dense()
