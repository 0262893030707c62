"""S2FT: train whole heads and channels of a few layers, chosen sparsely and computed densely."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.attach.delta import Adapter, Place
from gossamer.attach.slices import Slices
from gossamer.core import Density, Pattern, Support, method, select
from gossamer.core.errors import BudgetError, TargetError
from gossamer.score import magnitude, random, salt

# Where a block ends: its inputs are the heads and channels inside the block.
CLOSING = ("*o_proj", "*down_proj", "*out_proj", "*fc2", "*c_proj", "*output.dense", "*dense_4h_to_h", "*.wo", "*.w2")
# Where it begins: its outputs are the same heads and channels.
OPENING = ("*v_proj", "*up_proj", "*fc1", "*value", "*intermediate.dense", "*dense_h_to_4h", "*.w1", "*.w3")
ATTENTION = ("*attn*", "*attention*")


@method("s2ft", paper="arXiv:2412.06289", site="delta", row="P069")
def s2ft(
    *,
    density: float = 0.03,
    side: Literal["auto", "inputs", "outputs"] = "auto",
    score: Literal["random", "magnitude"] = "random",
    heads: int | Mapping[str, int] | None = None,
    seed: int = 0,
) -> Adapter:
    """Train w[:, s] of layers that close a block, w[s, :] of layers that open one; s = a few heads or channels.

    Δw = Σ_{k∈s} δ_k eₖᵀ, so y = x·wᵀ + x_s·δᵀ and ∂L/∂δ = (∂L/∂y)ᵀ·x_s: the gradient of the rest of w is never formed,
    and of x only the chosen columns are kept for it. Adapters on disjoint s do not meet, so they fuse by addition.

    By default the output projections of attention (whole heads) and of feed-forward blocks (channels) are changed.

    Args:
        density: share of heads or channels that learn in each layer, above 0 and up to 1; at least one does.
        side: "inputs" or "outputs" of each layer; "auto" = outputs of layers with the names of a block's first part
            (v_proj, up_proj, fc1, ...), inputs of all others.
        score: who is chosen: "random", or the largest Σ|w|.
        heads: entries per head on the chosen side of attention layers: one width, or by glob of the layer's name; the
            model's own (`config.head_dim`, or hidden size by heads) unless given, 1 where it has none.
        seed: of the lots; layers draw different ones.

    Raises:
        BudgetError: density is not above 0 and up to 1, or no such side or score.
        TargetError: a layer is no multiple of its heads' width, or the model has no layer of the usual names.

    Example:
        >>> delta = s2ft(density=0.25, side="inputs").make(torch.ones(6, 8), Place(torch.nn.Identity(), "fc"))
        >>> delta.values.shape
        torch.Size([6, 2])

    Reference: Yang et al., S2FT, arXiv:2412.06289.
    Departs from: nothing is permuted. The official code renumbers heads and channels so that the chosen ones are
        neighbours, and reshapes q by the number of key heads with an order over all heads, which under grouped-query
        attention is wrong; here the chosen columns are gathered, at a cost in proportion to how few they are. Counts
        per layer are equal and exact; the official code draws once over all layers, so a layer may get none.
    """
    _refuse(density, side, score)

    def make(w: Tensor, place: Place) -> Slices:
        way = ("outputs" if _named(place.layer, OPENING) else "inputs") if side == "auto" else side
        dim = 1 if way == "inputs" else 0
        width = _head(place, heads, w.shape[dim])
        worth = random(seed)(w.new_empty(w.shape[dim] // width), {"salt": salt(place.layer)})
        if score == "magnitude":
            worth = magnitude(w, {}).float().transpose(0, dim).reshape(len(worth), -1).sum(1)
        chosen = select(worth, Pattern("[c]"), Density(max(density, 1 / len(worth))))
        index = _channels(chosen, width).to(w.device)
        shape = list(w.shape)
        shape[dim] = len(index)
        return Slices(torch.zeros(shape, dtype=w.dtype, device=w.device), index, side=way)

    return Adapter("s2ft", make, CLOSING)


def _refuse(density: float, side: str, score: str) -> None:
    if not 0.0 < density <= 1.0:
        raise BudgetError(f"s2ft's density is the share that learns, above 0 and up to 1, got {density:g}")
    if side not in ("auto", "inputs", "outputs") or score not in ("random", "magnitude"):
        raise BudgetError(f"s2ft takes side auto, inputs or outputs and score random or magnitude, got {side}, {score}")


def _channels(chosen: Support, width: int) -> Tensor:
    return (chosen.kept.nonzero() * width + torch.arange(width, device=chosen.kept.device)).flatten()


def _named(layer: str, specs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(layer, spec) for spec in specs)


def _head(place: Place, heads: int | Mapping[str, int] | None, size: int) -> int:
    """Channels that are chosen together: a head's in attention layers, else 1."""
    width = _width(place, heads)
    if size % width:
        raise TargetError(f"layer {place.layer!r} has {size} channels, no multiple of a head's {width}; pass heads=")
    return width


def _width(place: Place, heads: int | Mapping[str, int] | None) -> int:
    if isinstance(heads, Mapping):
        return next((w for spec, w in heads.items() if fnmatchcase(place.layer, spec)), 1)
    if not _named(place.layer, ATTENTION):
        return 1
    return heads or _configured(place.model)


def _configured(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    count = getattr(config, "num_attention_heads", None)
    own = getattr(config, "head_dim", None)
    return own or (config.hidden_size // count if count else 1)  # type: ignore[union-attr]
