"""What the scores of links that move ask of training beside the weight, gathered in the steps that need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..core.dropgrow import DropGrow
from ..core.errors import TargetError
from ..core.policy import Policy
from ..core.sparsifier import Stats
from .activity import Activity
from .dense_gradient import DenseGradients
from .masked import Masked
from .targets import Target

DECAY = 0.9  # of the running mean of gradients, the usual momentum
SOURCE = {"correlation": "forward pass with gradients"}


class Evidence:
    """Listens where a policy asks for it, and tells what was found when a move is due.

    Args:
        mask: of a target; it holds what outlives a step.
        activity: listens to what flows through the layers, for policies that go by it.
    """

    def __init__(
        self,
        policy: Policy,
        targets: Sequence[Target],
        mask: Callable[[Target], Masked],
        gradients: DenseGradients,
        activity: Callable[[], Activity],
    ) -> None:
        self.policy, self.targets, self.mask, self.gradients = policy, targets, mask, gradients
        self.wanted = policy.evidence if isinstance(policy, DropGrow) else frozenset()
        self.activity = activity() if "correlation" in self.wanted else None
        self._listening, self._caught = False, {}

    def listen(self, due: bool) -> None:
        """Listen, or rest, in the step to come; `due`: links may move after it."""
        self._caught = {}
        self._listening = ("gradient" in self.wanted and due) or "momentum" in self.wanted
        (self.gradients.on if self._listening else self.gradients.off)()
        if self.activity is not None:
            (self.activity.on if due else self.activity.off)()

    def kept(self, target: Target, kept: Tensor) -> None:
        """A layer keeps these entries from now on."""
        if "fired" in self.wanted:
            self.mask(target).fired.logical_or_(kept)

    def note(self) -> None:
        """One step has been taken: the running mean of its gradients moves on, but not by one that overflowed."""
        self._caught = self.gradients.take() if self._listening else {}
        if "momentum" not in self.wanted:
            return
        for t in self.targets:
            gradient, mean = self._caught.get(t.name), self.mask(t).momentum
            if gradient is not None and bool(gradient.isfinite().all()):
                mean.lerp_(gradient.to(mean.dtype), 1.0 - DECAY)

    def take(self, step: int) -> dict[Target, Stats]:
        """What was found of each layer, outputs first; layers that a source says nothing of are left out.

        Raises:
            TargetError: a source says nothing of any layer.
        """
        stats: dict[Target, dict[str, Tensor]] = {t: {} for t in self.targets}
        for name in sorted(self.wanted):
            found = self._of(name)
            if not found:
                raise TargetError(
                    f"the support is due to move after step {step}, but no {SOURCE.get(name, 'gradient')} reached its "
                    "layers; call loss.backward(), optimizer.step() and then handle.step()"
                )
            stats = {t: {**held, name: found[t]} for t, held in stats.items() if t in found}
        return stats  # type: ignore[return-value]

    def off(self) -> None:
        """Listen no more."""
        self.gradients.off()
        if self.activity is not None:
            self.activity.remove()

    def _of(self, name: str) -> dict[Target, Tensor]:
        """One kind of evidence of each layer that has it."""
        if name == "fired":
            return {t: t.turned(self.mask(t).fired) for t in self.targets}
        if name == "correlation":
            assert self.activity is not None
            seen = self.activity.take()
            return {t: seen[t.name] for t in self.targets if t.name in seen}
        here = [t for t in self.targets if t.name in self._caught]
        return {t: t.turned(self._caught[t.name] if name == "gradient" else self.mask(t).momentum) for t in here}
