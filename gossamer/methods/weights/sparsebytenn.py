"""SparseByteNN: filters in groups that share which kernels they keep."""

from __future__ import annotations

from gossamer.core import Density, Pattern, Sparsifier, method
from gossamer.core.errors import BudgetError
from gossamer.score import magnitude


@method("sparsebytenn", paper="arXiv:2310.19509", row="P010")
def sparsebytenn(*, density: float = 0.7, group: int = 4) -> Sparsifier:
    """Keep the kernels with the largest Σ|w| over groups of neighbouring filters, which share what they keep.

    The pattern is (o {group}) [i] {...}; of a 1x1 convolution or a linear layer the kernels are its weights, and a
    depthwise filter is one kernel, always kept. Renumber the network first, with
    `gossamer.rearrange(model, example, pattern="4-row", density=...)`: filters with like kernels become neighbours,
    and the network computes what it did.

    Args:
        density: fraction of kernels kept, 0 to 1; 0.7 is the setting of the paper's speed claim.
        group: filters that share a support; CPU kernels serve 1, 2, 4 and 8.

    Raises:
        BudgetError: group is below 1, or density outside 0 to 1.

    Example:
        >>> import torch
        >>> w = torch.tensor([[9.0, 1.0], [8.0, 0.0], [1.0, 5.0], [0.0, 7.0]])
        >>> sparsebytenn(density=0.5, group=2).apply(w, {})[0].tolist()
        [[9.0, 0.0], [8.0, 0.0], [0.0, 5.0], [0.0, 7.0]]

    Reference: Xu et al., SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained Group
        Sparsity, arXiv:2310.19509.
    Departs from: written from the abstract, for the announced code was never released; one shot and no training (train
        on with `gossamer.attach.hold`); group sizes and the search for an order are ours.
    """
    if group < 1:
        raise BudgetError(f"group is the number of filters that share a support, 1 or more, got {group}; try 4")
    who = Pattern(f"(o {{{group}}}) [i] {{...}}")
    return Sparsifier(score=magnitude, pattern=who, budget=Density(density), name="sparsebytenn")
