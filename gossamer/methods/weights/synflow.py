"""SynFlow: prune before training, with no data, by how much flows through each weight."""

from __future__ import annotations

from gossamer.core import Density, Pattern, Sparsifier, method
from gossamer.core.errors import PatternError
from gossamer.core.pattern import pattern as read
from gossamer.score import synaptic_flow, weight_times_flow


@method("synflow", paper="arXiv:2006.05467")
def synflow(*, density: float = 0.1, pattern: str | Pattern = "unstructured", rounds: int = 100) -> Sparsifier:
    """Keep the largest |w|·∂R/∂|w|, all layers in one pool, in 100 rounds of density d^(k/100).

    R is the summed output of the network of absolute weights on an input of ones, in float64 and evaluation mode. As
    sums of scores are the same in every layer, no layer is emptied while another could give. `data=` is one example
    input, of which only the shape is used.

    Args:
        density: fraction kept, 0 to 1.
        pattern: only its tied axes matter.
        rounds: how often the flow is measured anew, at least 1.

    Raises:
        PatternError: the pattern fixes a count per pool, as 2:4 does, which leaves nothing to compete for.

    Example:
        >>> synflow(density=0.01).rounds
        100

    Reference: Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow,
        arXiv:2006.05467.
    Departs from: the official code computes in float32, where deep networks overflow, and prunes all that tie at the
        threshold; here counts are exact, ties to the lower index. Biases are not pruned.
    """
    who = read(pattern)
    if who.kept is not None:
        raise PatternError(f"pattern {who.expr!r} keeps {who.kept} in every pool, so layers cannot compete; use 'snip'")
    return Sparsifier(
        score=weight_times_flow,
        pattern=who,
        budget=Density(density),
        needs=("flow",),
        scope="model",
        name="synflow",
        probe=synaptic_flow,
        rounds=rounds,
    )
