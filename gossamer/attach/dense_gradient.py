"""The gradient of the dense weight, caught in the few steps whose support is about to move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.cut import cut, cut_
from ..core.ranks import mean_over_ranks
from .masked import Masked
from .sharded import is_sharded, own, part_of, whole
from .targets import Target


class DenseGradients:
    """Catches ∂L/∂w of every entry, kept or not, and leaves `.grad` zero off the support.

    While on, the masks let the whole gradient through; as soon as a backward pass has added to a `.grad`, a hook on the
    parameter copies it and cuts it. So clipping, accumulation over several backward passes, unscaling by a GradScaler
    and the optimizer see what they see in every other step. It costs one dense copy per layer, until `off()`.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target], mask: Callable[[Target], Masked]) -> None:
        self.model, self.targets, self.mask = model, targets, mask
        self._caught: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def on(self) -> None:
        """Catch from the next forward pass on."""
        self.off()
        for t in self.targets:
            original = t.parametrization(self.model).original
            if original.requires_grad:
                self.mask(t).listening = True
                hook = original.register_post_accumulate_grad_hook(_catch(self._caught, t.name, self.mask(t)))
                self._hooks.append(hook)

    def off(self) -> None:
        """Stop catching and let go of what was caught."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._caught = {}
        for t in self.targets:
            self.mask(t).listening = False

    def take(self) -> dict[str, Tensor]:
        """What was caught, by layer, as stored; the mean over ranks where several train together."""
        sharded = {n: whole(g) for n, g in self._caught.items() if is_sharded(g)}  # the mean already
        originals = {t.name: t.parametrization(self.model).original for t in self.targets}
        # A backward pass may reach other layers on this rank than on the next.
        held = {n: w.detach() for n, w in originals.items() if w.requires_grad and not is_sharded(w)}
        return mean_over_ranks({n: g for n, g in self._caught.items() if n not in sharded}, held) | sharded


def _catch(caught: dict[str, Tensor], name: str, mask: Masked) -> Callable[[Tensor], None]:
    def hook(original: Tensor) -> None:
        gradient = original.grad
        assert gradient is not None
        kept, before = part_of(mask.mask, gradient), caught.get(name)
        caught[name] = gradient.clone()
        if before is not None:
            # On the support `.grad` has added up already; off it, it was cut after the last backward pass.
            own(caught[name]).add_(cut(own(before), ~kept))
        cut_(own(gradient), kept)

    return hook
