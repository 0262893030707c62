"""Sparse spectral training: a weight as singular values and vectors, of which few vectors move at a time.

Shape suffixes: O outputs, I inputs, R = min(O, I) singular values, M vectors that move.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gossamer.attach.delta import Adapter, Delta, Place, trained
from gossamer.core import method
from gossamer.core.errors import BudgetError, TargetError
from gossamer.score import salt


class _Composition(torch.autograd.Function):
    """U·diag(σ)·V; the gradients of vectors leave σ out."""

    @staticmethod
    def forward(ctx, sigma_R: Tensor, left_OM: Tensor, right_MI: Tensor, u_OR: Tensor, v_RI: Tensor, moving_M: Tensor):
        u_OR, v_RI = u_OR.index_copy(1, moving_M, left_OM), v_RI.index_copy(0, moving_M, right_MI)
        ctx.save_for_backward(u_OR, v_RI, moving_M)
        return (u_OR * sigma_R) @ v_RI

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        u_OR, v_RI, moving_M = ctx.saved_tensors
        sigma_R = ((u_OR.t() @ grad_OI) * v_RI).sum(1)
        left_OM, right_MI = grad_OI @ v_RI[moving_M].t(), u_OR[:, moving_M].t() @ grad_OI
        return sigma_R, left_OM, right_MI, None, None, None


def composed(
    sigma_R: Tensor, left_OM: Tensor, right_MI: Tensor, u_OR: Tensor, v_RI: Tensor, moving_M: Tensor
) -> Tensor:
    """Σ_i σ_i·u_i·v_iᵀ, where the vectors `moving_M` are those of left and right, and all others are at rest.

    With G = ∂L/∂W, ∂σ_i = u_iᵀ·G·v_i is the true gradient; u_i gets G·v_i and v_i gets Gᵀ·u_i, without the factor σ_i
    of the true ones: a direction learns as fast where its singular value is small.

    Returns: W_OI.
    """
    with torch.autocast(sigma_R.device.type, enabled=False):
        return _Composition.apply(sigma_R, left_OM, right_MI, u_OR, v_RI, moving_M)


def drawn(sigma_R: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices without replacement, i with the probability ½·(1/R + σ_i/Σσ), in ascending order."""
    sigma_R = sigma_R.detach().double().cpu()
    share_R = sigma_R / sigma_R.sum() if bool(sigma_R.sum() > 0) else torch.zeros_like(sigma_R)
    odds_R = (1 / len(sigma_R) + share_R) / 2
    return torch.multinomial(odds_R, count, replacement=False, generator=generator).sort().values


class Spectral(Delta):
    """The weight is Σ σ_i·u_i·v_iᵀ; all of σ learns, and the vectors in `moving`, which are drawn anew every so often.

    Args:
        sigma: [R], at least 0.
        left, right: the vectors that move, [O, M] and [M, I].
        u, v: all vectors, [O, R] and [R, I]; those that move have their values of the last draw here.
        moving: indices of those that move, int64 [M].
        every: steps between draws.
        seed: of the draws.
    """

    kind = "spectral"

    def __init__(
        self, sigma: Tensor, left: Tensor, right: Tensor, u: Tensor, v: Tensor, moving: Tensor, *, every: int, seed: int
    ) -> None:
        super().__init__()
        self.sigma, self.left, self.right = trained(sigma), trained(left), trained(right)
        for name, value in {"u": u, "v": v, "moving": moving}.items():
            self.register_buffer(name, value)
        self.every, self.seed = every, seed

    def weight(self) -> Tensor:
        """W_OI."""
        return composed(self.sigma, self.left, self.right, self.u, self.v, self.moving)

    def change(self, w: Tensor) -> Tensor:
        return self.weight().to(w.dtype) - w

    def product(self, x_BI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return functional.linear(x_BI, self.weight().to(x_BI.dtype), bias_O)

    def advance(self, w: Tensor) -> None:
        self.sigma.clamp_(min=0)
        self.left.div_(torch.linalg.vector_norm(self.left, dim=0))
        self.right.div_(torch.linalg.vector_norm(self.right, dim=1, keepdim=True))

    @classmethod
    def settle(cls, deltas: Mapping[str, Delta], optimizer: torch.optim.Optimizer | None) -> None:
        due = [d for d in deltas.values() if int(d.steps) % d.every == 0]  # type: ignore[union-attr, operator]
        if due and optimizer is None:
            raise TargetError("sparse_spectral restarts momenta when other vectors move; call step(optimizer)")
        for delta in due:
            for p in delta.turn():  # type: ignore[operator]
                optimizer.state.pop(p, None)  # type: ignore[union-attr]

    @torch.no_grad()
    def turn(self) -> list[Tensor]:
        """Put the vectors that moved back, decompose anew after a round, and draw others. Returns whose momenta end."""
        self.u.index_copy_(1, self.moving, self.left.to(self.u.dtype))
        self.v.index_copy_(0, self.moving, self.right.to(self.v.dtype))
        past = int(self.steps) // self.every
        anew = past % -(-len(self.sigma) // len(self.moving)) == 0
        if anew:
            self._decompose()
        self.moving.copy_(drawn(self.sigma, len(self.moving), _lots(self.seed, past)))
        self.left.copy_(self.u[:, self.moving])
        self.right.copy_(self.v[self.moving])
        return [self.left, self.right, *([self.sigma] if anew else [])]

    def _decompose(self) -> None:
        for own, value in zip((self.u, self.sigma, self.v), torch.linalg.svd(self.weight(), full_matrices=False)):
            own.copy_(value)

    def constants(self) -> dict[str, object]:
        return {"every": self.every, "seed": self.seed}


def _lots(seed: int, turn: int) -> torch.Generator:
    """Lots of one layer and turn: a resumed run draws as the first did."""
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + turn) % 2**63)


@method("sparse_spectral", paper="arXiv:2405.15481", site="delta", row="P126")
def sparse_spectral(*, rank: int = 8, every: int = 200, seed: int = 0) -> Adapter:
    """Train a weight as U·Σ·Vᵀ: all singular values at every step, and `rank` pairs of vectors at a time, of full rank.

    Every `every` steps other vectors are drawn, i with probability ½·(1/R + σ_i/Σσ); their momenta start anew. Vectors
    get gradients without the factor σ (see `composed`) and are put back to length 1, and σ to at least 0, after each
    step. After ⌈R/rank⌉ draws, a round, W is decomposed anew, which makes the vectors orthogonal again; between, those
    that move are only of length 1. The gradient and the optimizer hold rank·(O + I) + R numbers of each weight.

    For pretraining as well as fine-tuning: `also=` lets embeddings and norms learn beside. Call `step(optimizer)`. What
    was learnt has full rank, so a saved adapter is larger than the weights: `merge()` and save the model.

    Args:
        rank: vectors that move at a time, 1 to R = min(O, I).
        every: steps between draws, at least 1. Unit: optimizer steps.
        seed: of the draws; layers draw different ones.

    Raises:
        BudgetError: rank or every is out of range.
        TargetError: a target is a convolution.

    Example:
        >>> delta = sparse_spectral(rank=2).make(torch.eye(4), Place(torch.nn.Identity(), "fc"))
        >>> torch.equal(delta.weight(), torch.eye(4)), delta.left.shape
        (True, torch.Size([4, 2]))

    Reference: Zhao et al., Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks,
        arXiv:2405.15481.
    Departs from: the product is computed with W, which is composed in every pass, and not by its factors; the frozen
        weight stays beside them, so memory is saved in gradients and momenta only; no warm-up after a draw, for Adam's
        first steps are as long as any; momenta of σ restart with each round, when σ is another.
    """
    if every < 1:
        raise BudgetError(f"every is a number of steps, at least 1, got {every}")

    def make(w_OI: Tensor, place: Place) -> Delta:
        if w_OI.dim() != 2:
            raise TargetError(
                f"sparse_spectral changes linear layers; {place.layer!r} has a weight of shape {tuple(w_OI.shape)}"
            )
        if not 1 <= rank <= min(w_OI.shape):
            raise BudgetError(f"sparse_spectral's rank goes from 1 to {min(w_OI.shape)} in {place.layer!r}, got {rank}")
        wide = w_OI.to(torch.promote_types(w_OI.dtype, torch.float32))
        u_OR, sigma_R, v_RI = torch.linalg.svd(wide, full_matrices=False)
        own = (seed * 0x9E3779B1 + int(salt(place.layer))) % 2**31
        moving_M = drawn(sigma_R, rank, _lots(own, 0)).to(w_OI.device)
        return Spectral(sigma_R, u_OR[:, moving_M], v_RI[moving_M], u_OR, v_RI, moving_M, every=every, seed=own)

    return Adapter("sparse_spectral", make)
