"""SaRA: train only the smallest weights, which the pretrained model hardly uses."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from gossamer.attach.delta import Adapter, Place
from gossamer.attach.entries import Entries, added
from gossamer.core import Density, Pattern, Support, above, method, select
from gossamer.core.errors import BudgetError
from gossamer.score import magnitude

LEAST = 64  # of a weight's shorter side, and 100 entries: below, the official code takes no nuclear norm
FEW = 100


@method("sara", paper="arXiv:2409.06633", site="delta", row="P074")
def sara(
    *,
    threshold: float = 2e-3,
    density: float | None = None,
    total_steps: int | None = None,
    again: int | None = None,
    nuclear: float = 5e-4,
    seed: int = 0,
) -> Adapter:
    """Train the weights with |w| < θ, and half-way stop those that have grown out of it: P₂ = P₁ ∧ |w + δ| < θ.

    The penalty λ·‖P ⊙ (w + δ)‖_* of one layer, drawn anew in each step, holds down the rank of what learns: add
    `adapters.penalty()` to the loss. Only chosen entries have a gradient and moments; the paper's rate is
    10⁻³·e^(−350θ), which is 5·10⁻⁴ at θ = 2·10⁻³.

    Args:
        threshold: θ, above 0.
        density: instead of θ, the share of each layer that learns, above 0 and up to 1; θ is then the layer's own.
        total_steps: length of the run, half of which is the first phase. Unit: optimizer steps.
        again: last step of the first phase; there is no second one if neither is given. Unit: optimizer steps.
        nuclear: λ, at least 0. Each step costs one singular value decomposition unless it is 0.
        seed: of the lots that draw the layer.

    Raises:
        BudgetError: an option is out of range.

    Example:
        >>> w = torch.tensor([[0.5, 0.001], [-0.0005, 0.3]])
        >>> sara().make(w, Place(torch.nn.Identity(), "fc")).index.tolist()
        [1, 2]

    Reference: Hu et al., SaRA, arXiv:2409.06633.
    Departs from: weights of the targets only; the official optimizer takes biases and norms too. Weight decay pulls δ
        to 0, so w + δ to the pretrained weight, where that optimizer pulls w + δ to 0. What stops learning keeps its
        value, as in its `adamw2`; its `adamw` writes |w| there, which flips signs.
    """
    _refuse(threshold, density, nuclear)
    last = again if again is not None or total_steps is None else total_steps // 2

    def make(w: Tensor, place: Place) -> Sara:
        small = -magnitude(w, {})
        within = Support(w != 0) if place.keep_zeros else None
        budget = above(-threshold) if density is None else Density(density)
        index = select(small, Pattern("[...]"), budget, within=within).kept.flatten().nonzero().flatten()
        top = float(w.reshape(-1)[index].abs().max()) if density is not None and len(index) else threshold
        values = torch.zeros(len(index), dtype=w.dtype, device=w.device)
        return Sara(values, index, threshold=top, again=last, nuclear=nuclear, seed=seed, turn=(place.number, place.of))

    return Adapter("sara", make)


def _refuse(threshold: float, density: float | None, nuclear: float) -> None:
    if threshold <= 0 or nuclear < 0:
        raise BudgetError(f"sara takes a threshold above 0 and nuclear of 0 or more, got {threshold:g} and {nuclear:g}")
    if density is not None and not 0.0 < density <= 1.0:
        raise BudgetError(f"sara's density is the share that learns, above 0 and up to 1, got {density:g}")


class Sara(Entries):
    """Entries that stop learning once they are no longer small.

    Args:
        values, index: as in `Entries`.
        learns: which still do; all unless given.
        held: the values of those that do not.
        turn: (number, count) of the layer among those that take turns at the penalty.
    """

    kind = "sara"

    def __init__(
        self,
        values: Tensor,
        index: Tensor,
        learns: Tensor | None = None,
        held: Tensor | None = None,
        *,
        threshold: float,
        again: int | None,
        nuclear: float,
        seed: int,
        turn: tuple[int, int],
    ) -> None:
        super().__init__(values, index)
        self.register_buffer("learns", torch.ones_like(index, dtype=torch.bool) if learns is None else learns)
        self.register_buffer("held", torch.zeros_like(self.values.detach()) if held is None else held)
        self.threshold, self.again, self.nuclear, self.seed = threshold, again, nuclear, seed
        self.turn = (int(turn[0]), int(turn[1]))

    def numbers(self) -> Tensor:
        return torch.where(self.learns, self.values, self.held)

    def advance(self, w: Tensor) -> None:
        if self.again is not None and int(self.steps) == self.again:
            now = self.numbers()
            small = (w.reshape(-1)[self.index] + now).abs() < self.threshold
            self.held.copy_(now)
            self.learns.logical_and_(small)

    def penalty(self, w: Tensor) -> Tensor | None:
        number, count = self.turn
        if self.nuclear == 0 or zlib.crc32(f"{self.seed}:{int(self.steps)}".encode()) % count != number:
            return None
        if w.dim() != 2 or min(w.shape) <= LEAST or int(self.learns.sum()) <= FEW:
            return None
        small_N = torch.where(self.learns, w.reshape(-1)[self.index] + self.numbers(), 0.0)
        matrix_OI = added(torch.zeros(w.shape, device=w.device), self.index, small_N)
        return self.nuclear * torch.linalg.matrix_norm(matrix_OI, "nuc")

    def constants(self) -> dict[str, object]:
        shared = {"threshold": self.threshold, "again": self.again, "nuclear": self.nuclear, "seed": self.seed}
        return {**shared, "turn": list(self.turn)}
