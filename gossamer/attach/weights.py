"""Masks on weights through torch's parametrize, and the handle that keeps them true while training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.budget import Above
from ..core.errors import FileDamaged, TargetError
from ..core.pattern import Pattern
from ..core.registry import get_method
from ..core.regroup import tied_rows
from ..core.shrink import hard
from ..core.sparsifier import Sparsifier, require_finite
from ..core.support import Support
from ..score import salt
from .targets import Target, find


class Masked(nn.Module):
    """weight = original on the support, 0 elsewhere. The mask is a buffer, so it lives in `state_dict`."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", kept)

    def forward(self, original: Tensor) -> Tensor:
        return torch.where(self.mask, original, torch.zeros((), dtype=original.dtype, device=original.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


@dataclass(frozen=True)
class LayerDensity:
    """One line of a handle's report: entries kept of a layer's entries."""

    name: str
    kept: int
    size: int

    @property
    def density(self) -> float:
        """Fraction kept."""
        return self.kept / max(self.size, 1)


class Handle:
    """Holds a sparsifier on a model while it trains. Call `step()` after `optimizer.step()`.

    Parameters are looked up by name at every step, never kept: `.to()`, checkpoints and sharding swap them.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsifier: Sparsifier,
        targets: Sequence[Target],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.model, self.sparsifier, self.targets, self.optimizer = model, sparsifier, tuple(targets), optimizer
        self.steps = 0
        for t in self.targets:  # all that can be refused is refused before any mask is attached
            require_finite(t.weight(model), f"the weight of layer {t.name!r}")
            (tied_rows if sparsifier.regroup else Pattern.place)(sparsifier.pattern, t.weight(model).shape)
        for t in self.targets:
            module = t.module(model)
            mask = Masked(torch.ones_like(module.weight, dtype=torch.bool))
            parametrize.register_parametrization(module, "weight", mask)
        self._update_if_due()

    def step(self) -> None:
        """One optimizer step has been taken: choose new supports where the policy says so, and hold zeros at zero."""
        self.steps += 1
        self._update_if_due()
        self._project()

    def supports(self) -> dict[str, Support]:
        """The current support of every layer, in the layout its weight is stored in."""
        return {t.name: Support(self._mask(t).mask) for t in self.targets}

    def report(self) -> list[LayerDensity]:
        """Kept entries per layer."""
        return [LayerDensity(n, s.count, s.kept.numel()) for n, s in self.supports().items()]

    @property
    def density(self) -> float:
        """Fraction kept over all layers together."""
        lines = self.report()
        return sum(r.kept for r in lines) / max(sum(r.size for r in lines), 1)

    def remove(self) -> nn.Module:
        """Write the zeros into the weights, take the masks away, and return the model."""
        for t in self.targets:
            parametrize.remove_parametrizations(t.module(self.model), "weight", leave_parametrized=True)
        return self.model

    def state_dict(self) -> dict[str, int]:
        """What the model's own state does not hold: the step count."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict()`; load the model's and optimizer's states as well.

        Raises:
            FileDamaged: the state has no step count.
        """
        if "steps" not in state:
            raise FileDamaged(f"a handle's state holds 'steps', got {sorted(state)}; pass what state_dict() returned")
        self.steps = int(state["steps"])

    def _mask(self, target: Target) -> Masked:
        return target.module(self.model).parametrizations.weight[0]

    def _original(self, target: Target) -> nn.Parameter:
        return target.module(self.model).parametrizations.weight.original

    def _update_if_due(self) -> None:
        if self.sparsifier.policy.due(self.steps):
            with torch.no_grad():
                for t, support in self._choose().items():
                    self._mask(t).mask.copy_(support.kept.t() if t.transposed else support.kept)
            self._project()

    def _choose(self) -> dict[Target, Support]:
        s = self.sparsifier
        weights = {t: self._view(t) for t in self.targets}
        for t, w in weights.items():
            require_finite(w, f"the weight of layer {t.name!r}")
        scores = {t: s.score(w, {"salt": salt(t.name)}) for t, w in weights.items()}
        if s.scope == "model":
            return s.choose_across(scores, step=self.steps)
        return {t: s.choose(x, step=self.steps) for t, x in scores.items()}

    def _view(self, target: Target) -> Tensor:
        w = self._original(target).detach()
        return w.t() if target.transposed else w

    def _project(self) -> None:
        """Pruned weights, and every optimizer slot shaped like them, are exactly zero."""
        with torch.no_grad():
            for t in self.targets:
                original, dropped = self._original(t), ~self._mask(t).mask
                slots = self.optimizer.state.get(original, {}).values() if self.optimizer else ()
                for slot in (original, *slots):
                    if isinstance(slot, Tensor) and slot.shape == original.shape:
                        slot.masked_fill_(dropped, 0)


def attach(
    model: nn.Module,
    method: str | Sparsifier,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
    regroup: bool = False,
    **options: object,
) -> Handle:
    """Make a model's weights sparse while it trains: one line here, and `handle.step()` after `optimizer.step()`.

    Args:
        method: a registered name with its `options`, or a Sparsifier.
        optimizer: its slots (momenta) are held at zero with the weights. Build it before or after: parameters
            are found by name, and parametrize keeps the same Parameter object.
        targets: glob patterns of layers, "re:" for regular expressions; empty = all but the output head.
        skip: layers to leave alone.
        regroup: let patterns that tie rows choose which rows they tie, anew with each support.

    Example:
        >>> handle = attach(model, "gradual_magnitude", density=0.1, total_steps=1000, optimizer=opt)  # doctest: +SKIP

    Raises:
        UnknownName: no such method or option.
        TargetError: a pattern matches nothing, or the method needs calibration statistics (use `prune`).
    """
    if not isinstance(method, str) and options:
        raise TargetError(
            f"a Sparsifier has its options already; {', '.join(options)} would be ignored, leave them out"
        )
    sparsifier = get_method(method)(**options) if isinstance(method, str) else method
    sparsifier = replace(sparsifier, regroup=True) if regroup else sparsifier
    if sparsifier.shrink is not hard:
        raise TargetError(
            f"attach keeps values hard (kept or zero), but {sparsifier.name!r} asks for {sparsifier.shrink}; "
            "parametrize with that rule yourself, or use shrink=hard"
        )
    if sparsifier.needs or sparsifier.solve:
        raise TargetError(
            f"method {sparsifier.name!r} needs calibration data; use gossamer.prune(model, ..., data=...)"
        )
    return Handle(model, sparsifier, find(model, tuple(targets), tuple(skip)).targets, optimizer)


def hold(model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, skip: Iterable[str] = ()) -> Handle:
    """Train a pruned model on without filling its zeros: the supports are the weights that are not 0 now.

    Layers without zeros are left alone, so that no mask is paid for where nothing is sparse.

    Raises:
        TargetError: no weight of the model has a zero; prune it first.
    """
    found = find(model, ("*",), tuple(skip)).targets
    targets = [t for t in found if bool((t.weight(model) == 0).any())]
    if not targets:
        raise TargetError("no prunable weight has a zero, so there is no support to hold; call gossamer.prune first")
    zeros_stay = Sparsifier(lambda w, _: w.abs(), Pattern("[...]"), Above(0.0), name="hold")
    return Handle(model, zeros_stay, targets, optimizer)
