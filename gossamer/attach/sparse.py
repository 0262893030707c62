"""backend="sparse": layers that store, multiply and train their kept weights only.

Shapes: T tokens, M outputs, K inputs, E kept weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.dropgrow import DropGrow
from ..core.errors import TargetError
from ..core.shrink import hard
from ..core.sparsifier import Sparsifier
from ..nn.sparse_linear import SparseLinear, carry
from .dense_gradient import DenseGradients
from .handle import Handle
from .targets import Target, sharers


class Wired:
    """What a handle asks of a mask, answered by a SparseLinear."""

    shrink = staticmethod(hard)

    def __init__(self, layer: Callable[[], SparseLinear]) -> None:
        self.layer, self.listening = layer, False

    @property
    def mask(self) -> Tensor:
        """The support as a mask [M, K], made at each look."""
        layer = self.layer()
        flat = torch.zeros(layer.out_features * layer.in_features, dtype=torch.bool, device=layer.values.device)
        flat[layer.positions()] = True
        return flat.view(layer.out_features, layer.in_features)


class SparseHandle(Handle):
    """A handle whose layers are `SparseLinear`s while it holds them: the same supports, the same losses.

    A move gives the layer another support and the optimizer's slots follow (`carry`). The gradient of the dense weight
    is dZᵀX, computed in the steps that move links by it, and only there is anything of size [M, K] made.
    """

    backend = "sparse"

    def _hold(self, target: Target) -> None:
        linear = target.module(self.model)
        layer = SparseLinear.from_dense(linear, torch.ones_like(linear.weight, dtype=torch.bool))
        layer.values.requires_grad_(linear.weight.requires_grad)
        layer.bias = linear.bias
        self._exchange(linear.weight, layer.values, lambda slot: slot.reshape(-1))
        self.model.set_submodule(target.name, layer)

    def _dense_gradients(self) -> DenseGradients:
        self._wired = {t.name: Wired(lambda t=t: self._layer(t)) for t in self.targets}
        return _OutputGradients(self.model, self.targets, self._mask)

    def _layer(self, target: Target) -> SparseLinear:
        return target.module(self.model)  # type: ignore[return-value]

    def _mask(self, target: Target) -> Wired:  # type: ignore[override]
        return self._wired[target.name]

    def _original(self, target: Target) -> nn.Parameter:
        return self._layer(target).values

    def _view(self, target: Target) -> Tensor:
        return self._layer(target).weight.detach()

    def _take(self, target: Target, kept: Tensor) -> None:
        layer = self._layer(target)
        if self.optimizer is None and self.steps:
            raise TargetError("layers are due to change their length, but whose? call handle.follow(optimizer) before")
        move = layer.set_support(kept)
        if self.optimizer is not None:
            carry(self.optimizer, layer.values, move)
        if self.steps:
            self._tally.change(target.name, move.grown, move.grown + move.dropped)

    def _counts(self) -> dict[str, int]:
        return {t.name: self._layer(t).values.numel() for t in self.targets}

    def _part_in_steps(self) -> str | None:
        return super()._part_in_steps() or "gave its layers new parameters, which an optimizer must know"

    def _project(self) -> None:
        """Nothing is stored that could be other than zero."""

    @property
    def held(self) -> bool:
        return all(isinstance(self._layer(t), SparseLinear) for t in self.targets)

    def remove(self) -> nn.Module:
        """Make the layers plain linear ones again, with zeros in their weights, and return the model."""
        self._evidence.off()
        self._meter.rest()
        for t in self.targets:
            layer = self._layer(t)
            linear = layer.to_dense()
            linear.weight.requires_grad_(layer.values.requires_grad)
            linear.bias = layer.bias
            self._exchange(layer.values, linear.weight, lambda slot, s=layer: _spread(slot, s))
            self.model.set_submodule(t.name, linear)
        return self.model

    def _exchange(self, old: nn.Parameter, new: nn.Parameter, turn: Callable[[Tensor], Tensor]) -> None:
        """The optimizer trains the new parameter in the old one's place, with its slots turned into the new shape."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        if slots := self.optimizer.state.pop(old, None):
            fits = lambda slot: isinstance(slot, Tensor) and slot.shape == old.shape
            self.optimizer.state[new] = {n: turn(s) if fits(s) else s for n, s in slots.items()}


def _spread(values_E: Tensor, layer: SparseLinear) -> Tensor:
    """One number per kept weight → the dense tensor [M, K]."""
    flat = values_E.new_zeros(layer.out_features * layer.in_features)
    flat[layer.positions()] = values_E
    return flat.view(layer.out_features, layer.in_features)


class _OutputGradients(DenseGradients):
    """∂L/∂W = dZᵀX of every entry, from what flows into and out of the layers; summed over backward passes."""

    def on(self) -> None:
        self.off()
        for t in self.targets:
            layer = t.module(self.model)
            if layer.values.requires_grad:
                self.mask(t).listening = True
                self._hooks.append(layer.register_forward_hook(_watch(self._caught, t.name), with_kwargs=True))

    def take(self) -> dict[str, Tensor]:
        return dict(self._caught)  # one process trains: see `refuse_what_is_not_linear`


def _watch(caught: dict[str, Tensor], name: str) -> Callable[..., None]:
    def add(dz: Tensor, x: Tensor) -> None:
        wide = torch.promote_types(dz.dtype, torch.float32)
        dw_MK = dz.reshape(-1, dz.shape[-1]).to(wide).t() @ x.reshape(-1, x.shape[-1]).to(wide)
        caught[name] = caught[name] + dw_MK if name in caught else dw_MK

    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        if output.requires_grad:
            x = (args[0] if args else kwargs["input"]).detach()
            output.register_hook(lambda dz: add(dz, x))

    return hook


def refuse_what_is_not_linear(
    model: nn.Module, targets: Sequence[Target], sparsifier: Sparsifier, optimizer: object
) -> None:
    """Raise where `SparseHandle` cannot hold what was asked for; nothing falls back silently.

    Raises:
        TargetError: a layer is not a plain `nn.Linear` in float32 or float64, is tied, or is the whole model; the
            method lets pruned weights learn; several processes train; or there is no optimizer, which would go on
            with the dense parameters where it was built before.
    """
    for t in targets:
        if why := _refusal(model, t):
            raise TargetError(
                f"backend='sparse' holds plain nn.Linear layers, but {t.name!r} {why}; name linear layers by targets=, "
                "or use backend='masked'"
            )
    if sparsifier.shrink is not hard or sparsifier.explore:
        raise TargetError(f"{sparsifier.name!r} lets pruned weights learn, so they must exist; use backend='masked'")
    if sparsifier.backward is not None:
        raise TargetError(f"{sparsifier.name!r} has a second support for the backward pass; use backend='masked'")
    if isinstance(sparsifier.policy, DropGrow) and (dense := sparsifier.policy.evidence & {"fired", "momentum"}):
        raise TargetError(f"{sparsifier.name!r} keeps {min(dense)!r} of every entry; use backend='masked'")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise TargetError("parameters that change their length cannot be shared by processes; use backend='masked'")
    if optimizer is None:
        raise TargetError(
            "backend='sparse' puts new parameters in place of the dense ones, which an optimizer built before does not "
            "know; pass optimizer=, or optimizer='later' and then call handle.follow(optimizer)"
        )


def _refusal(model: nn.Module, target: Target) -> str | None:
    module = target.module(model)
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}"
    if module is model:
        return "is the whole model"
    if len(sharers(model, target)) > 1:
        return "shares its weight with another layer"
    if module.weight.dtype not in (torch.float32, torch.float64):
        return f"is in {module.weight.dtype}"
    return None
