"""Attaching late: a training loop loads its checkpoint before it has the optimizer that a method needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..attach import Handle, attach
from ..attach.weights import hold
from ..core.errors import TargetError
from ..core.sparsifier import Sparsifier
from .brought import Brought

HOLD = "hold"


class Late:
    """A method, and what a checkpoint brought for it before it was attached.

    Args:
        method: as in `gossamer.attach`, or "hold" for a model that was pruned already.
        options: of `gossamer.attach` (or `attach.hold`), without optimizer and total_steps.
    """

    def __init__(self, method: str | Sparsifier, options: Mapping[str, object]) -> None:
        self.method, self.options = method, dict(options)
        self.handle: Handle | None = None
        self._brought = Brought()

    def expect(self, model: nn.Module) -> None:
        """From now on checkpoints of the held model load into this one; what earlier ones brought is forgotten."""
        self._brought = Brought.to(model)

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        state: Mapping[str, object] | None = None,
    ) -> Handle:
        """Attach; go on from a handle's `state` where there is one, with the masks that its checkpoint brought.

        Raises:
            TargetError: there is a state, but the masks that belong to it were never loaded.
        """
        if self._holds(model):  # a run was interrupted; the loop may have built another optimizer since
            self.handle.follow(optimizer)
        if state is None or not self._holds(model):
            self.end()
            self.handle = self._attached(model, optimizer, total_steps, resumes=state is not None)
        if state is not None:
            self.handle.load_state_dict(state)
        return self.handle

    def end(self) -> None:
        """Take the masks away; the zeros stay in the weights."""
        if self.handle is not None and self.handle.held:
            self.handle.remove()
        self.handle = None

    def _holds(self, model: nn.Module) -> bool:
        return self.handle is not None and self.handle.model is model and self.handle.held

    def _attached(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int | None, *, resumes: bool
    ) -> Handle:
        """Attaching chooses a first support and empties slots outside it, so what was loaded is put back after it."""
        if resumes and not self._brought.complete:
            raise TargetError(
                "the checkpoint's masks did not reach the model; pass the callback to Trainer(callbacks=[...]), not to "
                "add_callback, and a model, not model_init"
            )
        slots = copy.deepcopy(optimizer.state_dict()) if resumes else {}
        handle = self._take_hold(model, optimizer, total_steps)
        if resumes:
            model.load_state_dict(self._brought.state(), strict=False)
            optimizer.load_state_dict(slots)
        self._brought.layers.clear()
        return handle

    def _take_hold(self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int | None) -> Handle:
        if self.method == HOLD:
            return hold(model, optimizer=optimizer, **self.options)  # type: ignore[arg-type]
        return attach(model, self.method, optimizer=optimizer, total_steps=total_steps, **self.options)  # type: ignore[arg-type]
