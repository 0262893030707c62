"""Passes: rewrite a captured graph, operator by operator, into fewer and larger ones. Outputs stay the same.

Every pass takes the graph and its constants and returns how often it applied.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from .attention import attentions, merged_projections, split_projections
from .cleaning import no_ops, sunk_views
from .elementwise import activations, gates, tanh_gelus
from .graphs import Constants, drop_unused
from .images import batch_norms, global_pools, padded_convolutions, pools
from .norms import norms
from .products import products, residuals, scaled_products, transposed_products
from .rotary import rotaries

PASSES: tuple[Callable[[fx.Graph, Constants], int], ...] = (
    no_ops,
    tanh_gelus,
    products,
    transposed_products,
    scaled_products,
    padded_convolutions,
    batch_norms,
    norms,
    rotaries,
    attentions,
    residuals,
    activations,
    sunk_views,
    gates,
    merged_projections,
    split_projections,
    pools,
    global_pools,
)


def simplify(graph: fx.Graph, constants: Constants) -> dict[str, int]:
    """Every pass, in the order in which one prepares the next. Returns how often each applied."""
    done = {p.__name__: p(graph, constants) for p in PASSES}
    drop_unused(graph)
    return done
