"""Attaching late: a training loop loads its checkpoint before it has the optimizer that a method needs."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..attach import Handle, attach
from ..core.sparsifier import Sparsifier

_HELD = re.compile(r"(.*)\.(parametrizations\.weight\..*|values|indptr|indices)")


class Late:
    """A method, and what a checkpoint brought for it before it was attached.

    A checkpoint of a held model names `layer.parametrizations.weight.original`, or `layer.values` where the layer
    stored its kept weights only; the bare model has `layer.weight`. `expect` lets such a checkpoint load into a bare
    model and keeps what it brought until `begin` attaches.

    Args:
        method: as in `gossamer.attach`.
        options: of `gossamer.attach`, without optimizer and total_steps.
    """

    def __init__(self, method: str | Sparsifier, options: Mapping[str, object]) -> None:
        self.method, self.options = method, dict(options)
        self.handle: Handle | None = None
        self._brought: dict[str, Tensor] = {}

    def expect(self, model: nn.Module) -> None:
        """From now on checkpoints of the held model load into this one."""
        model.register_load_state_dict_pre_hook(self._translate)

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        state: Mapping[str, object] | None = None,
    ) -> Handle:
        """Attach; go on from a handle's `state` where there is one, with the masks that its checkpoint brought."""
        held = self.handle is not None and self.handle.held
        if held and state is None:
            self.end()
        if self.handle is None:
            self.handle = self._attached(model, optimizer, total_steps)
        else:
            self.handle.follow(optimizer)
        if state is not None:
            self.handle.load_state_dict(state)
        return self.handle

    def end(self) -> None:
        """Take the masks away; the zeros stay in the weights."""
        if self.handle is not None and self.handle.held:
            self.handle.remove()
        self.handle = None

    def _attached(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int | None) -> Handle:
        """Attaching chooses a first support and empties slots outside it, so what was loaded is put back after it."""
        slots = copy.deepcopy(optimizer.state_dict()) if self._brought else None
        handle = attach(model, self.method, optimizer=optimizer, total_steps=total_steps, **self.options)  # type: ignore[arg-type]
        if slots is not None:
            model.load_state_dict(self._brought, strict=False)
            optimizer.load_state_dict(slots)
            self._brought = {}
        return handle

    def _translate(self, model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        """Set aside what only a held layer has, and give the bare one a weight."""
        bare = dict(model.named_modules())
        for key in list(state):
            found = _HELD.fullmatch(key.removeprefix(prefix))
            layer = bare.get(found[1]) if found else None
            if not hasattr(layer, "weight") or hasattr(layer, found[2].split(".")[0]):
                continue  # held already, or no layer of ours
            value = state.pop(key)
            self._brought[key.removeprefix(prefix)] = value.clone()
            # Kept weights alone are no dense weight: the layer stays as it is until they are loaded into it.
            state.setdefault(f"{prefix}{found[1]}.weight", layer.weight.detach())
            if found[2].endswith(".original"):
                state[f"{prefix}{found[1]}.weight"] = value
