"""Masked: the parametrization that makes a weight sparse in the forward pass."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..core.cut import learned, traced
from ..core.shrink import Shrink, fade_of, hard, straight_through
from ..core.support import Support


class Masked(nn.Module):
    """weight = shrink(original, support). The mask is a buffer, so it lives in `state_dict`.

    Args:
        kept: the support, in the layout the weight is stored in.
        shrink: what becomes of the values and of their gradient; `hard` keeps or zeroes them.
        two_way: hold a second support, `back`, for the gradient by the layer's inputs.

    While `listening`, the gradient of the dense weight reaches the original: same forward, no cut on the way back.
    A weight whose zeros are in place (`settle`) is used as it is, without a copy, as long as nobody writes to it.
    Where the shrink rule fades with time, `fade` holds what is left now; as a buffer it leaves compiled graphs alone.
    What moves of the support go by, and outlives a step, is here where a policy asks for it (see `remember`): `fired`,
    entries kept at some time, and `momentum`, the running mean of the dense gradient.
    """

    def __init__(self, kept: Tensor, shrink: Shrink = hard, *, two_way: bool = False) -> None:
        super().__init__()
        self.register_buffer("mask", kept)
        self.register_buffer("back", kept.clone() if two_way else None)
        fades = callable(fade_of(shrink))
        self.register_buffer("fade", torch.ones((), device=kept.device) if fades else None)
        self.register_buffer("fired", None)
        self.register_buffer("momentum", None)
        self.shrink = shrink
        self.listening = False
        self._settled: tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, ...]] | None = None

    def remember(self, original: Tensor, evidence: frozenset[str]) -> None:
        """Hold what of the evidence outlives a step, of this weight."""
        if "fired" in evidence:
            self.fired = torch.zeros_like(self.mask)
        if "momentum" in evidence:
            self.momentum = torch.zeros_like(original.detach())

    def forward(self, original: Tensor) -> Tensor:
        if self.fade is not None:
            return self.shrink(original, Support(self.mask), self.fade.to(original.dtype))  # type: ignore[call-arg]
        if self._is_settled(original):
            return original if self.listening else learned(original, self.mask)
        rule = straight_through if self.listening else self.shrink
        return rule(original, Support(self.mask))

    def settle(self, original: Tensor) -> None:
        """Everything off the support is 0 in the original, as it stands now."""
        # Inference tensors count no versions, and torch swaps no tensor that is referred to.
        unseen = original.is_inference() or self.mask.is_inference()
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        refs = weakref.ref(original), weakref.ref(self.mask)
        self._settled = None if unseen or swaps else (*refs, self._state(original))

    def _state(self, original: Tensor) -> tuple[int, ...]:
        """Whatever changes with every write to the weight or its mask that torch can see."""
        return original._version, original.data_ptr(), self.mask._version, self.mask.data_ptr()

    def _is_settled(self, original: Tensor) -> bool:
        """Outside training, where averaged or loaded weights may have been put in behind torch's back, never."""
        if traced() or not torch.is_grad_enabled() or not self._settled:
            return False
        weight, mask, state = self._settled
        return weight() is original and mask() is self.mask and state == self._state(original)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_settled": None}  # a copy has a weight of its own

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight
