"""PST: prune while fine-tuning, with scores and updates that are low-rank and structured.

Shape suffixes: O outputs, I inputs, R rank of the update, S rank of the scores.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gossamer.attach.delta import Adapter, Delta, Place, trained
from gossamer.core import Cubic, Density, Pattern, method, select
from gossamer.core.errors import BudgetError, TargetError
from gossamer.score import salt

WARMUP, COOLDOWN = 0.1, 0.3  # of the official scripts


@method("pst", paper="arXiv:2205.11005", site="delta", row="P035")
def pst(
    *,
    density: float = 0.1,
    total_steps: int,
    rank: int = 8,
    score_rank: int | None = None,
    beta: float = 1.0,
    alpha: tuple[float, float] = (1.0, 1.0),
    warmup: float = WARMUP,
    cooldown: float = COOLDOWN,
    pattern: str | Pattern = "unstructured",
    seed: int = 0,
) -> Adapter:
    """Keep the largest s = |w'| + α₁·AB + α₂·(R_i + C_j) of w' = w + β·UV; only A, B, R, C, U and V learn.

    The support is chosen anew in every forward pass, along a cubic ramp from dense to `density`. Straight through it,
    ∂L/∂s = ∂L/∂(m⊙w')⊙w' stands in for the data-driven worth of each weight, which the small matrices learn. U and A
    start normal, the others 0, so that the first support is the largest |w|. `merge()` then `remove()` leave a plain
    model with zeros.

    Args:
        density: fraction kept at the end, above 0 and up to 1.
        total_steps: length of the run. Unit: optimizer steps.
        rank: of UV, at least 1.
        score_rank: of AB; as `rank` unless given.
        beta: β.
        alpha: α₁ and α₂.
        warmup, cooldown: shares of the run before and after the ramp.
        pattern: who competes; "unstructured" is each layer for itself.
        seed: of U and A.

    Raises:
        BudgetError: an option is out of range.
        TargetError: a target is a convolution.

    Example:
        >>> delta = pst(total_steps=100, rank=2).make(torch.ones(4, 6), Place(torch.nn.Identity(), "fc"))
        >>> sum(p.numel() for p in delta.parameters())
        50

    Reference: Li et al., Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, arXiv:2205.11005.
    Departs from: support counts are exact, ties go to the lower index; any pattern.
    """
    ranks = (rank, rank if score_rank is None else score_rank)
    if min(ranks) < 1 or not 0.0 < density <= 1.0 or warmup < 0 or cooldown < 0 or warmup + cooldown >= 1:
        raise BudgetError(
            "pst takes ranks of 1 or more, a density above 0 and up to 1, and a ramp within the run, got "
            f"ranks {ranks}, density {density:g}, warmup {warmup:g} and cooldown {cooldown:g}"
        )
    begin = round(warmup * total_steps)
    ramp = {"density": density, "begin": begin, "steps": max(round((1 - cooldown) * total_steps) - begin, 1)}
    rule = {"alpha": tuple(alpha), "beta": beta, "pattern": str(pattern), **ramp}
    return Adapter("pst", partial(_made, ranks=ranks, rule=rule, seed=seed))


def _made(w_OI: Tensor, place: Place, *, ranks: tuple[int, int], rule: dict[str, object], seed: int) -> Pst:
    if w_OI.dim() != 2:
        raise TargetError(f"pst changes linear layers, and {place.layer!r} has a weight of shape {tuple(w_OI.shape)}")
    lots = torch.Generator().manual_seed(seed * 0x9E3779B1 + int(salt(place.layer)))
    (size_O, size_I), (rank, score_rank) = w_OI.shape, ranks
    drawn = lambda r: torch.randn(size_O, r, generator=lots).to(w_OI)
    none = partial(torch.zeros, dtype=w_OI.dtype, device=w_OI.device)
    update = {"U": drawn(rank), "V": none(rank, size_I)}
    scores = {"A": drawn(score_rank), "B": none(score_rank, size_I), "R": none(size_O), "C": none(size_I)}
    return Pst(**update, **scores, **rule)


class Pst(Delta):
    """m⊙(w + β·UV) − w, with m the winners of the scores at this step's density.

    Args:
        U, V: [O, R] and [R, I].
        A, B, R, C: [O, S], [S, I], [O] and [I].
        density, begin, steps: the ramp's end, and its first step and length. Unit: optimizer steps.
    """

    kind = "pst"

    def __init__(
        self,
        U: Tensor,
        V: Tensor,
        A: Tensor,
        B: Tensor,
        R: Tensor,
        C: Tensor,
        *,
        alpha: tuple[float, float],
        beta: float,
        pattern: str,
        density: float,
        begin: int,
        steps: int,
    ) -> None:
        super().__init__()
        for name, values in {"U": U, "V": V, "A": A, "B": B, "R": R, "C": C}.items():
            setattr(self, name, trained(values))
        self.rule = {"alpha": tuple(alpha), "beta": beta, "pattern": pattern}
        self.ramp = {"density": density, "begin": begin, "steps": steps}

    def scores(self, w_OI: Tensor) -> tuple[Tensor, Tensor]:
        """(w', s)."""
        first, second = self.rule["alpha"]
        new_OI = w_OI + (self.rule["beta"] * self.U @ self.V).to(w_OI.dtype)
        return new_OI, new_OI.abs() + first * self.A @ self.B + second * (self.R[:, None] + self.C)

    def change(self, w: Tensor) -> Tensor:
        new_OI, scores_OI = self.scores(w)
        budget = Density(Cubic(1.0, self.ramp["density"], self.ramp["begin"], self.ramp["steps"]))
        support = select(scores_OI.detach(), self.rule["pattern"], budget, step=int(self.steps))
        return _Through.apply(new_OI, scores_OI, support.kept) - w

    def constants(self) -> dict[str, object]:
        return {**self.rule, "alpha": list(self.rule["alpha"]), **self.ramp}


class _Through(torch.autograd.Function):
    """m⊙w', whose gradient goes to w' where m is 1, and times w' to all scores."""

    @staticmethod
    def forward(ctx, new_OI: Tensor, scores_OI: Tensor, kept_OI: Tensor) -> Tensor:
        ctx.save_for_backward(new_OI, kept_OI)
        ctx.dtype = scores_OI.dtype
        return new_OI * kept_OI

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        new_OI, kept_OI = ctx.saved_tensors
        return g * kept_OI, (g * new_OI).to(ctx.dtype), None
