"""The handle that chooses supports, moves them, and keeps them true while a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.cut import cut_
from ..core.dropgrow import DropGrow
from ..core.errors import TargetError
from ..core.schedule import at
from ..core.shrink import StraightThrough, fade_of, hard
from ..core.sparsifier import Sparsifier, require_finite
from ..core.support import Support, counted
from ..score import salt
from .account import Account
from .activity import Activity
from .choose import choose_both
from .dense_gradient import DenseGradients
from .evidence import Evidence
from .fit import part_in_steps, refuse_misfits, refuse_other_state, refuse_other_supports
from .frozen import Frozen, frozen
from .masked import Masked
from .meter import Meter
from .moving import moved
from .pull import pull
from .recurrent import let_go, put_behind
from .sharded import is_sharded, own, part_of, whole
from .tally import Tally
from .targets import Target, refuse_foreign, sharers, slots
from .twoway import close_back, open_back


class Handle(Account):
    """Holds a sparsifier on a model while it trains. Call `step()` after `optimizer.step()`.

    Parameters are looked up by name at every step, never kept: `.to()`, checkpoints and sharding swap them. Lots are
    drawn from (seed, layer, step), so there is no random state to save and every rank draws the same.

    Args:
        sparsifier: what all layers have in common.
        per_layer: the sparsifier of each layer by name, where their densities differ.
        start: the first supports, outputs first, where they are chosen already (see `first_supports`).
    """

    backend = "masked"

    def __init__(
        self,
        model: nn.Module,
        sparsifier: Sparsifier,
        targets: Sequence[Target],
        optimizer: torch.optim.Optimizer | None,
        *,
        per_layer: Mapping[str, Sparsifier] | None = None,
        start: Mapping[Target, Support] | None = None,
    ) -> None:
        self.model, self.sparsifier, self.targets, self.optimizer = model, sparsifier, tuple(targets), optimizer
        self.per_layer = dict(per_layer or {t.name: sparsifier for t in self.targets})
        self.steps = 0
        self._waiting = False  # a move was due, but its gradient was not finite
        self._tally = Tally()
        refuse_misfits(model, sparsifier, self.targets)
        for t in self.targets:
            self._hold(t)
        self._gradients = self._dense_gradients()
        activity = lambda: Activity(model, self.targets, self._original)
        self._evidence = Evidence(sparsifier.policy, self.targets, self._mask, self._gradients, activity)
        self._frozen = Frozen()
        self._pulling = self._pull()
        self._meter = Meter(model, self.targets)
        if start is None:
            self._update_if_due()
        else:
            self._change(start.items())
        self._fade()
        self._listen()

    def step(self) -> None:
        """One optimizer step has been taken: choose new supports where the policy says so, and hold zeros at zero.

        Raises:
            TargetError: the support is due to move by the gradient, but no backward pass has left one; or the method
                has a part in the optimizer's step and was never given one.
        """
        if self.optimizer is None and (part := self._part_in_steps()):
            raise TargetError(f"method {self.sparsifier.name!r} {part}; call handle.follow(optimizer) before")
        self.steps += 1
        self._meter.add(*self._work())
        self._evidence.note()
        self._update_if_due()
        self._fade()
        self._project()
        self._listen()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The one whose slots are looked after; of a wrapper, as Accelerate's `prepare` returns, what is within."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, given: torch.optim.Optimizer | None) -> None:
        within = getattr(given, "optimizer", None)
        self._optimizer = within if isinstance(within, torch.optim.Optimizer) else given

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Look after this optimizer's slots from now on: where it was built after attaching, as FSDP2 needs.

        Raises:
            TargetError: it does not train the held weights.
        """
        refuse_foreign(optimizer, {t.name: self._original(t) for t in self.targets})
        self.optimizer = optimizer
        self._stop_pulling()
        self._pulling = self._pull()
        self._project()
        if any(is_sharded(self._original(t)) for t in self.targets):
            self._listen()  # what listened to the whole parameters would hear nothing of the sharded ones

    def supports(self) -> dict[str, Support]:
        """The current support of every layer, in the layout its weight is stored in."""
        return {t.name: Support(self._mask(t).mask) for t in self.targets}

    def take(self, supports: Mapping[str, Support]) -> None:
        """Keep these supports from now on, in the layout the weights are stored in; layers not named stay as they are.

        Raises:
            TargetError: a name is not that of a layer held, or a support has another shape than its weight.
        """
        held = {t.name: t for t in self.targets}
        refuse_other_supports(supports, {n: self._mask(t).mask.shape for n, t in held.items()})
        for name, support in supports.items():
            self._take(held[name], support.kept.to(self._mask(held[name]).mask.device))
        self._project()

    def freeze(self, supports: Mapping[str, Support], values: Mapping[str, Tensor]) -> None:
        """These entries learn no more: their gradient is 0, and wherever a layer keeps one it has its value given here.

        Ask again after loading a state, which does not hold them; another call takes the place of this one.

        Args:
            supports: what is frozen, by layer, in the layout its weight is stored in.
            values: weights of these layers, read where something is frozen.

        Raises:
            TargetError: a name or a shape is not that of a layer held, pruned weights learn, or weights are sharded or
                stored sparse.
        """
        found = frozen(self, supports, values)
        self._gradients.off()  # its hooks must come after these: what is frozen has no gradient to grow by
        self._frozen.thaw()
        self._frozen = found
        found.hook()
        self._project()
        self._listen()

    @property
    def held(self) -> bool:
        """False once the masks were taken away."""
        return all(t.held(self.model) for t in self.targets)

    def remove(self) -> nn.Module:
        """Write the zeros into the weights, take the masks away, and return the model.

        Raises:
            TargetError: FSDP2 has sharded the weights, and holds on to their names.
        """
        if any(is_sharded(self._original(t)) for t in self.targets):
            raise TargetError(
                "the masks of sharded weights cannot be taken away; gather the model's full state dict, load it into "
                "an unsharded model that was attached the same way, and call remove() there"
            )
        self._evidence.off()
        self._frozen.thaw()
        self._meter.rest()
        self._stop_pulling()
        for t in self.targets:
            self._mask(t).shrink, self._mask(t).fade = hard, None  # what has not faded yet goes as well
            for module, tensor in sharers(self.model, t):
                if self.sparsifier.backward is not None:
                    close_back(module)
                let_go(module, tensor)
        return self.model

    def state_dict(self) -> dict[str, object]:
        """What the states of model (weights, masks) and optimizer do not hold: where the policy stands, and counts."""
        return {
            "method": self.sparsifier.name,
            "backend": self.backend,
            "steps": self.steps,
            "waiting": self._waiting,
            **self._tally.state_dict(),
            **self._meter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`; load the model's and optimizer's states as well.

        Raises:
            FileDamaged: the state is not a handle's, or another method's or backend's.
        """
        refuse_other_state(state, self.sparsifier, self.backend)
        self.steps, self._waiting = int(state["steps"]), bool(state["waiting"])  # type: ignore[call-overload]
        self._tally.load_state_dict(state)
        self._meter.load_state_dict(state)
        self._fade()
        self._listen()

    def _hold(self, target: Target) -> None:
        two_way = self.sparsifier.backward is not None
        everything = torch.ones_like(target.stored(self.model), dtype=torch.bool)
        mask = Masked(everything, self.sparsifier.shrink, two_way=two_way)
        if isinstance(self.sparsifier.policy, DropGrow):
            mask.remember(target.stored(self.model), self.sparsifier.policy.evidence)
        for module, tensor in sharers(self.model, target):  # tied layers share one mask
            put_behind(mask, module, tensor)
            if two_way:
                open_back(module)

    def _part_in_steps(self) -> str | None:
        return part_in_steps(self.sparsifier)

    def _pull(self) -> RemovableHandle | None:
        shrink = self.sparsifier.shrink
        if self.optimizer is None or not isinstance(shrink, StraightThrough) or not shrink.pull:
            return None
        pairs = lambda: ((self._original(t), self._mask(t).mask) for t in self.targets)
        return pull(self.optimizer, shrink.pull, pairs)

    def _stop_pulling(self) -> None:
        if self._pulling is not None:
            self._pulling.remove()

    def _fade(self) -> None:
        """The forward pass to come sees pruned weights as far faded as they are by now."""
        fade = fade_of(self.sparsifier.shrink)
        self._left = at(fade, self.steps)
        if callable(fade):
            for t in self.targets:
                self._mask(t).fade.fill_(self._left)

    def _dense_gradients(self) -> DenseGradients:
        return DenseGradients(self.model, self.targets, self._mask)

    def _mask(self, target: Target) -> Masked:
        return target.parametrization(self.model)[0]  # type: ignore[return-value]

    def _original(self, target: Target) -> nn.Parameter:
        return target.parametrization(self.model).original  # type: ignore[return-value]

    def _view(self, target: Target) -> Tensor:
        return target.turned(whole(self._original(target).detach()))

    def _update_if_due(self) -> None:
        if self._waiting or self.sparsifier.policy.due(self.steps):
            moving = self.steps and isinstance(self.sparsifier.policy, DropGrow)
            self._change(self._move().items() if moving else self._choose())

    def _change(self, supports: Iterable[tuple[Target, Support]]) -> None:
        for t, support in supports:
            self._take(t, t.turned(support.kept))
        self._project()

    def _take(self, target: Target, kept: Tensor) -> None:
        """The layer keeps these entries from now on; what came and went is counted, without waiting for the device."""
        mask = self._mask(target).mask
        if self.steps:
            self._tally.change(target.name, counted(kept > mask), counted(kept ^ mask))
        mask.copy_(kept)
        self._evidence.kept(target, kept)

    def _choose(self) -> Iterator[tuple[Target, Support]]:
        """New supports by score; layer by layer, so that the scores of one layer at a time are held."""
        for t in self.targets:
            require_finite(self._view(t), f"the weight of layer {t.name!r}")
        if self.sparsifier.scope == "model":
            scores = {t: self.sparsifier.score(self._view(t), self._stats(t)) for t in self.targets}
            yield from self.sparsifier.choose_across(scores, step=self.steps).items()  # type: ignore[arg-type, misc]
            return
        for t in self.targets:
            kept, back = choose_both(self.per_layer[t.name], self._view(t), self._stats(t), self.steps)
            if back is not None:
                self._mask(t).back.copy_(t.turned(back.kept))
            yield t, kept

    def _stats(self, target: Target) -> dict[str, Tensor]:
        return {"salt": salt(target.name), "place": torch.tensor(self.targets.index(target))}

    def _move(self) -> dict[Target, Support]:
        """Drop and grow. A step whose gradient overflowed (a GradScaler skips it) leaves the move to the next one."""
        policy = self.sparsifier.policy
        assert isinstance(policy, DropGrow)
        found = self._evidence.take(self.steps)
        self._waiting = not all(bool(x.isfinite().all()) for stats in found.values() for x in stats.values())
        if self._waiting:
            return {}
        held = {t: Support(t.turned(self._mask(t).mask)) for t in found}
        return moved(policy, self.sparsifier.pattern, held, self._view, found, self.steps)

    def _listen(self) -> None:
        self._evidence.listen(self._waiting or self.sparsifier.policy.due(self.steps + 1))

    def _project(self) -> None:
        """Pruned weights, and every optimizer slot shaped like them, are exactly zero."""
        if not self._cuts:
            return
        with torch.no_grad():
            for t in self.targets:
                mask, original = self._mask(t), self._original(t)
                kept = part_of(mask.mask, original)
                for pruned in (original, *slots(self.optimizer, original)):
                    cut_(own(pruned), kept)
                self._frozen.hold(t.name, original, kept, slots(self.optimizer, original))
                if not is_sharded(original):
                    mask.settle(original)
