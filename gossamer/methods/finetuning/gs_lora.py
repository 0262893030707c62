"""GS-LoRA: forgetting by few adapters, chosen by a group lasso.

Shape suffixes: N samples, C classes, F features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.attach.adapters import Adapters
from gossamer.attach.delta import Adapter, Delta, Place
from gossamer.attach.low_rank import LowRank
from gossamer.core import method
from gossamer.core.errors import BudgetError, TargetError, unknown
from gossamer.penalty import Group

from .lora import lora

By = Literal["block", "layer", "matrix"]
# Feed-forward layers, as the paper has it, by the names they usually go by.
FEED_FORWARD = (
    "*.up", "*.down", "*gate_proj", "*up_proj", "*down_proj", "*fc1", "*fc2", "*mlp.c_fc", "*mlp.c_proj",
    "*intermediate.dense", "*[0-9].output.dense",
)  # fmt: skip


class GroupedLowRank(LowRank):
    """w + scale·B·A; after each step, groups of factors shrink as a whole, t·strength at a time, until they are zero.

    Args:
        A: [R, I].
        B: [O, R].
        scale: factor of the product.
        groups: names of the groups of A and of B; equal names, also of other layers, are one group.
        strength: λ, times the learning rate t.
    """

    kind = "grouped_low_rank"

    def __init__(self, A: Tensor, B: Tensor, *, scale: float = 1.0, groups: Sequence[str], strength: float) -> None:
        super().__init__(A, B, scale=scale)
        self.groups, self.strength = tuple(groups), strength

    def constants(self) -> dict[str, object]:
        return {"scale": self.scale, "groups": list(self.groups), "strength": self.strength}

    @classmethod
    def settle(cls, deltas: Mapping[str, Delta], optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            raise TargetError("gs_lora shrinks by its learning rate; call step(optimizer)")
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for parts in _grouped(deltas).values():
            _shrink(parts, max(delta.strength for delta, _ in parts), rates, optimizer)


Parts = list[tuple[GroupedLowRank, torch.nn.Parameter]]


def _grouped(deltas: Mapping[str, Delta]) -> dict[str, Parts]:
    """The factors of each group, by its name."""
    found: dict[str, Parts] = {}
    for delta in deltas.values():
        for group, factor in zip(delta.groups, (delta.A, delta.B)):  # type: ignore[union-attr, arg-type]
            found.setdefault(group, []).append((delta, factor))  # type: ignore[arg-type]
    return found


@torch.no_grad()
def _shrink(parts: Parts, strength: float, rates: Mapping[int, float], optimizer: torch.optim.Optimizer) -> None:
    factors = [p for _, p in parts]
    missing = [p for p in factors if id(p) not in rates]
    if missing:
        raise TargetError("the optimizer does not train these adapters; build it from their parameters()")
    for p, left in zip(factors, Group(strength).prox(factors, float(rates[id(factors[0])]))):
        p.copy_(left)
    if not any(bool(p.any()) for p in factors):
        for p in factors:
            optimizer.state.pop(p, None)


def group_norms(adapters: Adapters) -> dict[str, float]:
    """The norm of each group of the adapters in use, by the group's name; 0 is a group that is off."""
    mine = {n: d for n, d in adapters.deltas().items() if isinstance(d, GroupedLowRank)}
    norm = lambda parts: torch.linalg.vector_norm(torch.stack([p.detach().norm() for _, p in parts])).item()
    return {name: norm(parts) for name, parts in _grouped(mine).items()}


def forgetting_loss(
    kept_NC: Tensor, kept_N: Tensor, forgotten_NC: Tensor, forgotten_N: Tensor, *, bound: float, weight: float = 0.3
) -> Tensor:
    """CE(kept) + β·max(BND − CE(forgotten), 0): classify what is kept, fail at what is to be forgotten, up to a bound.

    Args:
        kept_NC, forgotten_NC: logits of samples of classes that stay, and of those that go; none of a kind counts as 0.
        kept_N, forgotten_N: their labels.
        bound: BND, above 0: what the cross-entropy of the forgotten is driven to. Unit: nats. ln(C) is a guess by lot;
            the official code takes 105 for logits that a face-recognition head multiplied by 64.
        weight: β, at least 0; 0.2 to 0.4 in the official code.

    Returns: a scalar.
    """
    kept = functional.cross_entropy(kept_NC, kept_N) if len(kept_N) else kept_NC.sum()
    if not len(forgotten_N):
        return kept
    return kept + weight * (bound - functional.cross_entropy(forgotten_NC, forgotten_N)).relu()


def prototypes(features_NF: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """The mean feature of each class of the model before it forgets, [C, F]; zeros for classes without samples."""
    sums_CF = features_NF.new_zeros(classes, features_NF.shape[1]).index_add_(0, labels_N, features_NF)
    return sums_CF / torch.bincount(labels_N, minlength=classes).clamp(min=1)[:, None]


def apart(features_NF: Tensor, labels_N: Tensor, prototypes_CF: Tensor) -> Tensor:
    """KL(softmax(prototype) ‖ softmax(feature)), the mean over samples: how far a batch is from what its classes were.

    GS-LoRA++ adds w_r·apart(kept) + w_f·max(18 − apart(forgotten), 0) to the loss, w_f from 0.01 to 0.02.
    """
    were_NF = prototypes_CF[labels_N].log_softmax(1)
    return functional.kl_div(features_NF.log_softmax(1), were_NF, reduction="batchmean", log_target=True)


@method("gs_lora", paper="arXiv:2501.09705", site="delta", row="P070")
def gs_lora(
    *, rank: int = 8, strength: float = 10.0, by: By = "block", alpha: float | None = None, seed: int = 0
) -> Adapter:
    """Low-rank changes of feed-forward layers, of which a group lasso leaves few: g ← max(1 − t·λ/‖g‖, 0)·g.

    A group g is what one block's adapters are made of: ‖g‖ = √(Σ‖A‖² + Σ‖B‖²) over its layers. After each step with
    learning rate t it loses t·λ of its norm, so one that the loss does not hold up goes to exactly zero and stays
    there. Meant for forgetting: train with `forgetting_loss`, and what is to stay is touched by few blocks only.
    Call `step(optimizer)`; `group_norms` tells who is left.

    Args:
        rank: r, at least 1.
        strength: λ, at least 0, in norm per unit of learning rate: a group of norm 2 that nothing holds is off after
            2/(t·λ) steps. Adam moves a factor of n entries by up to t·√n a step.
        by: what a group is: "block" (up to the last number in a layer's name), "layer" or "matrix".
        alpha: of `lora`.
        seed: of A.

    Raises:
        BudgetError: rank or strength is out of range.
        UnknownName: no such way to group.
        TargetError: no feed-forward layer has a usual name; name yours with targets=.

    Example:
        >>> gs_lora(by="block").make(torch.ones(6, 8), Place(torch.nn.Identity(), "layers.3.mlp.up_proj")).groups
        ('layers.3', 'layers.3')

    Reference: Zhao et al., Practical Continual Forgetting for Pre-trained Vision Models (GS-LoRA++), arXiv:2501.09705.
    Departs from: the official code adds the penalty to the loss, where Adam's division makes its strength the same for
        all and no group ever becomes exactly zero; here it is a proximal step after the optimizer's. Its λ of 1e-4 is
        a share of the gradient and says nothing about this one. Momenta of a group that went to zero are forgotten.
    """
    if not strength >= 0:
        raise BudgetError(f"gs_lora's strength is a number of at least 0, got {strength}")
    if by not in ("block", "layer", "matrix"):
        raise unknown("way to group", by, ("block", "layer", "matrix"))
    plain = lora(rank=rank, alpha=alpha, seed=seed)

    def make(w_OI: Tensor, place: Place) -> Delta:
        start = plain.make(w_OI, place)
        groups = _groups(place.layer, by)
        return GroupedLowRank(start.A, start.B, scale=start.scale, groups=groups, strength=strength)  # type: ignore[arg-type]

    return Adapter("gs_lora", make, FEED_FORWARD)


def _groups(layer: str, by: By) -> tuple[str, str]:
    if by == "matrix":
        return f"{layer}.A", f"{layer}.B"
    numbered = re.match(r"(?:.*\.)?\d+(?=\.|$)", layer)
    own = numbered[0] if by == "block" and numbered else layer
    return own, own
