"""Fast Sparse ConvNets: the 1x1 convolutions of a mobile network, pruned while it trains."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from gossamer.core import Pattern, Sparsifier, method

from .gradual_magnitude import gradual_magnitude


@method("fast_sparse_convnets", paper="arXiv:1911.09723", row="P006")
def fast_sparse_convnets(
    *,
    density: float = 0.1,
    total_steps: int,
    begin: int = 0,
    until: int | None = None,
    every: int = 100,
    pattern: str | Pattern = "unstructured",
) -> Sparsifier:
    """Cut the smallest |w| of 1x1 convolutions along a cubic ramp; first layer, depthwise filters and classifier stay.

    `pointwise(model)` names the layers; give the late ones to a second handle with pattern "4-row", as the paper does
    with its blocks: late layers have many channels and few pixels, where groups gain most and cost least.

    Args:
        density: fraction kept at the end of the ramp, 0 to 1; 0.1 to 0.2 in the paper.
        total_steps: length of the run. Unit: optimizer steps.
        begin: first step of the ramp. Unit: optimizer steps.
        until: its last step; 3/4 of the run unless given. Unit: optimizer steps.
        every: steps between cuts, at least 1.
        pattern: "unstructured", or rows in groups for late layers.

    Raises:
        BudgetError: a density outside 0 to 1, a pattern that fixes its own, or a ramp that does not fit into the run.

    Example:
        >>> early, late = pointwise(model)[:20], pointwise(model)[20:]  # doctest: +SKIP
        >>> how = {"density": 0.1, "total_steps": 1000, "optimizer": opt}  # doctest: +SKIP
        >>> gossamer.attach(model, "fast_sparse_convnets", targets=early, **how)  # doctest: +SKIP
        >>> gossamer.attach(model, "fast_sparse_convnets", targets=late, pattern="4-row", **how)  # doctest: +SKIP

    Reference: Elsen et al., Fast Sparse ConvNets, arXiv:1911.09723.
    Departs from: the ramp's length is yours to choose, the paper trains on ImageNet for hundreds of thousands of steps;
        counts are exact per layer.
    """
    ramp = gradual_magnitude(
        density=density, total_steps=total_steps, begin=begin, until=until, every=every, pattern=pattern
    )
    return replace(ramp, name="fast_sparse_convnets")


def pointwise(model: nn.Module) -> list[str]:
    """Names of the 1x1 convolutions that mix channels, in the order of definition: what the paper prunes.

    Example:
        >>> pointwise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)))
        ['2']
    """
    return [
        n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1
    ]
