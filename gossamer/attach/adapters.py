"""The handle on a model that carries adapters: train, switch, merge, fuse, take off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import TargetError, unknown
from .adapted import Adapted, changed, take_off, turned
from .delta import Adapter, Delta
from .merging import Merged, write


class Adapters:
    """Holds the adapters of a model. Call `step()` after `optimizer.step()`.

    All that lasts is in the layers, which are looked up at each use; `model.state_dict()` holds the deltas beside the
    weights, whose names stay.

    Args:
        model: the model that carries them.
        was_trained: for each parameter by name, whether it learnt before it was frozen.
        also: names of parameters of the model that learn with the deltas.
    """

    def __init__(self, model: nn.Module, was_trained: Mapping[str, bool], also: Iterable[str] = ()) -> None:
        self.model, self.was_trained, self.also = model, dict(was_trained), tuple(also)
        self.settings: dict[str, dict[str, object]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters on the model."""
        return tuple(self.settings)

    @property
    def in_use(self) -> dict[str, float]:
        """Adapters that count now, with their factors."""
        return {name: factor for _, layer in self.layers() for name, factor in layer.uses.items()}

    @property
    def merged(self) -> bool:
        """True while the weights hold the adapters."""
        return any(layer.undo is not None for _, layer in self.layers())

    def layers(self) -> Iterator[tuple[str, Adapted]]:
        """Layers that carry deltas, by name; those tied to an earlier one too."""
        yield from ((name, m) for name, m in self.model.named_modules() if isinstance(m, Adapted))

    def deltas(self, name: str | None = None) -> dict[str, Delta]:
        """The deltas of one adapter by layer; of those in use unless it is named (keys end in the adapter's name)."""
        if name is not None:
            self._known(name)
            return {at: layer.deltas[name] for at, layer in self._once() if name in layer.deltas}
        return {f"{at}.{n}": layer.deltas[n] for at, layer in self._once() for n in layer.uses}

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """What an optimizer trains: the numbers of one adapter (those in use unless named), and `also`."""
        yield from (p for delta in self.deltas(name).values() for p in delta.parameters())
        yield from (self.model.get_parameter(own) for own in self.also)

    @property
    def trainable(self) -> int:
        """How many numbers learn."""
        return sum(p.numel() for p in self.parameters())

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After `optimizer.step()`: adapters that move do so; for others this only counts.

        Args:
            optimizer: the one that stepped, for methods that go by its learning rate or restart its momenta.

        Raises:
            TargetError: the adapters are merged, so that what was trained had no effect; unmerge first. Or a method in
                use needs the optimizer.
        """
        self._refuse_merged("training goes on")
        for _, layer in self._once():
            for name in layer.uses:
                layer.deltas[name].steps += 1
                with torch.no_grad():
                    layer.deltas[name].advance(turned(layer, layer.weight))
        held = self.deltas()
        for own in dict.fromkeys(type(delta) for delta in held.values()):
            own.settle({at: delta for at, delta in held.items() if type(delta) is own}, optimizer)

    def penalty(self) -> Tensor:
        """What the methods in use add to the loss; 0 for those that add nothing."""
        found = [
            p
            for _, layer in self._once()
            for name in layer.uses
            if (p := layer.deltas[name].penalty(turned(layer, layer.weight))) is not None
        ]
        return torch.stack(found).sum() if found else torch.zeros(())

    def use(self, which: str | Mapping[str, float] | None) -> None:
        """Switch: from now on this adapter counts, or several with a factor each, or none.

        Several run side by side on the sum w + Σ factor·change; `fuse` makes one of them that runs as fast as one.

        Raises:
            UnknownName: no adapter has that name.
            TargetError: the adapters are merged.
        """
        self._refuse_merged("another adapter is used")
        factors = {which: 1.0} if isinstance(which, str) else dict(which or {})
        for name in factors:
            self._known(name)
        for _, layer in self.layers():
            layer.uses = {name: float(f) for name, f in factors.items() if name in layer.deltas}

    def merge(self, zeros: Literal["refuse", "keep", "fill"] = "refuse") -> list[Merged]:
        """Write the adapters in use into the weights; the model then costs what it cost before it had any.

        Args:
            zeros: of pruned weights (more than 10 % zeros): "refuse" to fill any, "keep" them and cut the change, or
                let the change "fill" them.

        Returns:
            Per layer, entries written and zeros before and after.

        Raises:
            TargetError: merged already, or zeros would be filled; nothing is written then.
        """
        self._refuse_merged("merging again")
        done: list[Merged] = []
        try:
            for name, layer in self._once():
                if layer.uses:
                    with torch.no_grad():
                        new = turned(layer, changed(layer))
                    layer.undo, merged = write(name, layer.weight, new, zeros)
                    done.append(merged)
        except TargetError:
            self.unmerge()
            raise
        self._tell_tied()
        return done

    def unmerge(self) -> None:
        """Take the adapters out of the weights again: every bit is as it was."""
        for _, layer in self._once():
            if layer.undo is not None:
                layer.undo(layer.weight)
        for _, layer in self.layers():
            layer.undo = None

    def fuse(self, name: str, factors: Mapping[str, float]) -> None:
        """Make one adapter of several: its change is Σ factor·change. It is added, not switched to.

        S2FT's adapters on other rows or columns do not meet, so nothing of either is lost.

        Raises:
            UnknownName: no adapter has one of the names.
            TargetError: the name is taken, or deltas of this kind cannot be joined.
        """
        self.refuse_name(name)
        for one in factors:
            self._known(one)
        joined = {at: _joined(layer, factors) for at, layer in self._once() if any(n in layer.deltas for n in factors)}
        for at, layer in self._once():
            if at in joined:
                _share(self.model, layer, name, joined[at])
        self.settings[name] = {"method": "fused", "of": dict(factors)}

    def drop(self, name: str) -> None:
        """Forget one adapter.

        Raises:
            TargetError: it is merged, or in use; switch first.
        """
        self._known(name)
        self._refuse_merged("dropping one")
        if name in self.in_use:
            raise TargetError(f"adapter {name!r} is in use; call use() with another, or with None, first")
        for _, layer in self.layers():
            if name in layer.deltas:
                del layer.deltas[name]
        del self.settings[name]

    def add(self, method: str | Adapter, *, name: str, **options: object) -> None:
        """Put another adapter beside those that are there, without switching to it; options as in `adapt`."""
        from .adapting import add

        add(self, method, name=name, **options)

    def save(self, path: str | Path, name: str | None = None, *, peft: bool = False) -> Path:
        """Write one adapter to a folder: `adapter_model.safetensors` and `adapter_config.json`.

        Args:
            path: the folder; other files in it stay.
            name: which; the one in use unless given.
            peft: write it as a LoRA of peft. Exact for "lora" and "s2ft", whose rank is then the number of channels;
                impossible for others.

        Raises:
            TargetError: several are in use and none is named, or the change is no low-rank product.
        """
        from .adapter_files import save

        return save(self, path, self._one() if name is None else name, peft=peft)

    def load(self, path: str | Path, name: str = "default") -> None:
        """Add an adapter from a folder that `save` or peft (LoRA) wrote, without switching to it.

        Raises:
            FileDamaged: a file is missing or altered.
            TargetError: the adapter is of a kind that is unknown here, or does not fit the model.
        """
        from .adapter_files import load

        load(self, path, name)

    def remove(self) -> None:
        """Take all adapters off; what is merged stays in the weights. The model learns again what it learnt before."""
        for _, layer in list(self.layers()):
            take_off(layer)
        for name, p in self.model.named_parameters():
            p.requires_grad_(self.was_trained.get(name, True))
        self.settings = {}

    def refuse_name(self, name: str) -> None:
        """Raise where an adapter cannot be called so."""
        if name in self.settings:
            raise TargetError(f"an adapter is called {name!r} already; pick another name, or drop() it")
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise TargetError(f"an adapter's name becomes part of parameter names; {name!r} cannot, use a plain word")

    def _one(self) -> str:
        names = list(self.in_use)
        if len(names) != 1:
            raise TargetError(f"{len(names)} adapters are in use ({', '.join(names)}); say which with name=")
        return names[0]

    def _once(self) -> Iterator[tuple[str, Adapted]]:
        """Layers, tied ones once."""
        seen: set[int] = set()
        for name, layer in self.layers():
            if id(layer.weight) not in seen:
                seen.add(id(layer.weight))
                yield name, layer

    def _tell_tied(self) -> None:
        undone = {id(layer.weight): layer.undo for _, layer in self._once()}
        for _, layer in self.layers():
            layer.undo = undone[id(layer.weight)]

    def _known(self, name: str) -> None:
        if name not in self.settings:
            raise unknown("adapter", name, self.settings)

    def _refuse_merged(self, what: str) -> None:
        if self.merged:
            raise TargetError(f"the adapters are merged into the weights; call unmerge() before {what}")

    def __repr__(self) -> str:
        share = self.trainable / max(sum(p.numel() for p in self.model.parameters()), 1)
        return f"Adapters({', '.join(self.names)}; {self.trainable} numbers learn, {share:.2%} of the model's)"


def _joined(layer: Adapted, factors: Mapping[str, float]) -> Delta:
    parts = [(layer.deltas[n], float(f)) for n, f in factors.items() if n in layer.deltas]
    kinds = {type(delta) for delta, _ in parts}
    if len(kinds) > 1:
        names = ", ".join(sorted(k.kind for k in kinds))
        raise TargetError(f"adapters of different kinds ({names}) cannot become one; use({{name: factor}}) runs both")
    return kinds.pop().joined(parts)


def _share(model: nn.Module, layer: Adapted, name: str, delta: Delta) -> None:
    for m in model.modules():
        if isinstance(m, Adapted) and m.weight is layer.weight:
            m.deltas[name] = delta.to(layer.weight.device)
