"""The work that training takes, counted from the supports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import TargetError
from .recurrent import RECURRENT, states_width
from .targets import Target, sharers


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the held layers since training began, a multiply and an add each one.

    Per step and layer, with n entries of which k are kept, learning ones l, and P positions (rows of the layer's
    output: samples × tokens, pixels or time steps): forward 2kP, backward 2bP for the inputs and 2lP for the weights.
    b is k, or what the support of the backward pass keeps where it has one; l is n in steps that need the dense
    gradient, else k. While pruned weights still count for something in the forward pass, k and b are n. Dense training
    would take 6nP.

    Args:
        forward, backward: with every zero skipped. The masked path computes dense; sparse kernels earn this.
        dense: the same steps of the dense layers.
    """

    forward: int
    backward: int
    dense: int

    @property
    def share(self) -> float:
        """Of dense training's work, in [0, 1]; 0 before the first step."""
        return (self.forward + self.backward) / max(self.dense, 1)


class Meter:
    """Adds up `Flops`. Positions are counted in the first step and taken to stay what they were.

    A hook on each layer counts them and goes when the step is done. Compiled forward passes do not run it; call
    `Handle.observe(batch)` there.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        self.sizes = {t.name: t.weight(model).numel() for t in targets}
        self.positions: dict[str, int] = {}
        self.forward = self.backward = self.dense = 0
        self._hooks: list[RemovableHandle] = []
        self.watch(model, targets)

    def watch(self, model: nn.Module, targets: Sequence[Target]) -> None:
        """Count positions anew, in passes that train."""
        self.rest()
        self.positions = {}
        self._hooks = [
            module.register_forward_hook(_count(self.positions, t.name, _width(module, t.weight(model))))
            for t in targets
            for module, _ in sharers(model, t)
        ]

    def observe(
        self, model: nn.Module, targets: Sequence[Target], args: Sequence, kwargs: Mapping[str, object]
    ) -> None:
        """Count positions anew in one pass in evaluation mode, whether or not the caller wants gradients.

        Raises:
            TargetError: the pass ran none of the layers where it could be seen; what was counted before stays.
        """
        before, training = self.positions, [(m, m.training) for m in model.modules()]
        self.watch(model, targets)
        try:
            with torch.enable_grad():
                model.eval()(*args, **kwargs)
            if not self.positions:
                raise TargetError(
                    "the pass ran none of the held layers where it could be seen; pass a batch that reaches them, and "
                    "compile with torch.compile(model), which leaves the model itself as it is"
                )
            before = self.positions
        finally:
            self.positions = before
            self.rest()
            for module, mode in training:
                module.training = mode

    def rest(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def add(self, kept: Mapping[str, int], back: Mapping[str, int], learning: Mapping[str, int]) -> None:
        """One step has been taken, with so many entries in the forward pass, by the inputs and by the weights."""
        self.rest()
        for name, positions in self.positions.items():
            self.forward += 2 * kept[name] * positions
            self.backward += 2 * (back[name] + learning[name]) * positions
            self.dense += 6 * self.sizes[name] * positions

    def add_dense(self) -> None:
        """One step has been taken by layers that nothing was cut from."""
        self.rest()
        for name, positions in self.positions.items():
            product = 2 * self.sizes[name] * positions
            self.forward += product
            self.backward += 2 * product
            self.dense += 3 * product

    def flops(self) -> Flops:
        """So far."""
        return Flops(self.forward, self.backward, self.dense)

    def state_dict(self) -> dict[str, object]:
        """Plain numbers."""
        return {"positions": dict(self.positions), "spent": [self.forward, self.backward, self.dense]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        self.forward, self.backward, self.dense = state["spent"]  # type: ignore[misc]
        if state["positions"]:
            self.rest()
            self.positions = dict(state["positions"])  # type: ignore[call-overload]


def _width(module: nn.Module, weight: Tensor) -> int:
    """Numbers that a layer puts out per position."""
    return states_width(module) if isinstance(module, RECURRENT) else weight.shape[0]


def _count(positions: dict[str, int], name: str, width: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[object, ...], output: Tensor | tuple) -> None:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            while isinstance(output, tuple):  # of recurrent layers: (states, last state), packed or not
                output = output[0]
            positions[name] = positions.get(name, 0) + output.numel() // max(width, 1)

    return hook
