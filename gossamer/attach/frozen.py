"""Entries that learn no more, in a layer whose other entries do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import TargetError
from ..core.shrink import hard
from ..core.support import Support
from .fit import refuse_other_supports
from .masked import Masked
from .sharded import is_sharded

if TYPE_CHECKING:
    from .handle import Handle


class Frozen:
    """Holds values where they are: gradients there are 0 from the backward pass on, so that clipping does not see them.

    Args:
        entries: by layer: the parameter, what of it is frozen, and a tensor of its shape with the values.
    """

    def __init__(self, entries: Mapping[str, tuple[nn.Parameter, Tensor, Tensor]] | None = None) -> None:
        here = lambda p, frozen, values: (p, frozen.to(p.device), values.detach().to(p))
        self._entries = {name: here(*entry) for name, entry in (entries or {}).items()}
        self._hooks: list[RemovableHandle] = []

    def hook(self) -> None:
        """Cut gradients from the next backward pass on."""
        for parameter, kept_still, _ in self._entries.values():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_cut(kept_still)))

    def hold(self, name: str, parameter: Tensor, kept: Tensor, slots: Iterable[Tensor]) -> None:
        """Frozen entries that are kept have their value again, and no momentum, whatever the optimizer did."""
        if name not in self._entries:
            return
        _, kept_still, values = self._entries[name]
        parameter.copy_(values.where(kept_still & kept, parameter))
        for slot in slots:
            slot.masked_fill_(kept_still, 0)

    def thaw(self) -> None:
        """Let everything learn again."""
        for hook in self._hooks:
            hook.remove()
        self._entries, self._hooks = {}, []


def frozen(handle: Handle, supports: Mapping[str, Support], values: Mapping[str, Tensor]) -> Frozen:
    """These entries of a handle's layers, ready to be held.

    Raises:
        TargetError: a name or a shape is not that of a layer held, pruned weights learn, or weights are sharded or
            stored sparse.
    """
    sparsifier, held = handle.sparsifier, {t.name: t for t in handle.targets}
    if sparsifier.shrink is not hard or sparsifier.explore or sparsifier.search:
        raise TargetError(f"{sparsifier.name!r} lets pruned weights learn, so they cannot be frozen; take 'set'")
    for t in handle.targets:
        if not isinstance(handle._mask(t), Masked) or is_sharded(handle._original(t)):
            raise TargetError(
                f"the weight of layer {t.name!r} is sharded or stored sparse, and entries of it cannot be frozen; "
                "train it whole, with backend='masked'"
            )
    refuse_other_supports(supports, {n: handle._mask(t).mask.shape for n, t in held.items()})
    for name, support in supports.items():
        if name not in values or values[name].shape != support.shape:
            shape = tuple(values[name].shape) if name in values else "missing"
            raise TargetError(f"the values of layer {name!r} are {shape}, its weight is {tuple(support.shape)}")
    return Frozen({n: (handle._original(held[n]), s.kept, values[n]) for n, s in supports.items()})


def _cut(kept_still: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.masked_fill_(kept_still, 0)

    return hook
