"""A checkpoint of a held model loads into the bare one: its weights now, its masks when the model is held again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..formats import CSR

_MASKED = frozenset({"original", "0.mask"})
_WIRED = frozenset(CSR.PARTS)
_HELD_BY_MASK = re.compile(r"((.*)\.parametrizations\.(\w+))\.(original|0\.\w+)")
_HELD_BY_WIRES = re.compile(rf"(.*)\.({'|'.join(CSR.PARTS)})")
_NAME = "_gossamer_brought"


class Brought:
    """What a model's checkpoints brought that only its held layers have a place for: the parts of each weight by name.

    A checkpoint of a held model names `layer.parametrizations.weight.original` and its mask, or `layer.values` and
    their places; recurrent layers have several weights. The bare model has `layer.weight`: it gets the values with
    zeros where nothing is kept, so that it can be evaluated. The parts may come in several loads, as from a checkpoint
    in shards; the last one sets the weight.
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
        arrived: dict[_Place, dict[str, Tensor]] = {}
        for key in list(state):
            place, part = _placed(key[len(prefix) :]) if key.startswith(prefix) else (None, "")
            if place and _is_bare(modules.get(place.layer), place, part):
                arrived.setdefault(place, {})[part] = state.pop(key).clone()
        for place, parts in arrived.items():
            held = self.layers.setdefault(place.name, {})
            if held.keys() & parts.keys():
                held.clear()  # another checkpoint's
            held.update(parts)
            if _complete(held):
                shape = getattr(modules[place.layer], place.tensor).shape
                state[f"{prefix}{place.layer}.{place.tensor}"] = _dense(held, shape)


@dataclass(frozen=True)
class _Place:
    """What a held weight's parts are named after, and where the bare model has it."""

    name: str
    layer: str
    tensor: str


def _placed(key: str) -> tuple[_Place | None, str]:
    if found := _HELD_BY_MASK.fullmatch(key):
        return _Place(found[1], found[2], found[3]), found[4]
    if found := _HELD_BY_WIRES.fullmatch(key):
        return _Place(found[1], found[1], "weight"), found[2]
    return None, ""


def _is_bare(layer: nn.Module | None, place: _Place, part: str) -> bool:
    """The layer is one of ours, and not held already."""
    if layer is None or not hasattr(layer, place.tensor):
        return False
    return not (is_parametrized(layer, place.tensor) or hasattr(layer, part))


def _complete(parts: Mapping[str, Tensor]) -> bool:
    return parts.keys() >= _MASKED or parts.keys() >= _WIRED


def _dense(parts: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """The weight that is left when the masks are taken away."""
    if parts.keys() >= _MASKED:
        values = parts.get("0.frozen", parts["original"])  # where weights are searched, the original holds scores
        return values.masked_fill(~parts["0.mask"], 0)
    return CSR.from_parts({name: parts[name] for name in _WIRED}, dict(zip(("rows", "cols"), shape))).to_dense()
