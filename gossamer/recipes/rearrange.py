"""rearrange: renumber a network's channels so that filters with like weights become neighbours. Its outputs stay.

Shape suffixes: M channels of a space, U units per channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.budget import Density
from ..core.errors import BudgetError, PatternError
from ..core.pattern import Pattern
from ..core.pattern import pattern as read
from ..core.regroup import regroup, tied_rows
from .channels import Space, spaces


@dataclass(frozen=True)
class Rearranged:
    """What `rearrange` did.

    Args:
        moved: per numbering of channels that changed, the layers that write it.
        fixed: the layers of every numbering left alone, with the reason.
        difference: largest difference of the outputs on the example, relative to their largest value.
    """

    moved: tuple[tuple[str, ...], ...]
    fixed: tuple[tuple[tuple[str, ...], str], ...]
    difference: float


def rearrange(
    model: nn.Module, example: Tensor, *, pattern: str | Pattern = "4-row", density: float = 0.5
) -> Rearranged:
    """Renumber channels over the whole network, in place, so that rows which share a support well stand together.

    Permutes the outputs of each layer, and with them the norms, depthwise filters, residual partners and the inputs of
    all that read them: the same function, to rounding. Prune afterwards with a pattern that ties neighbouring rows.
    Layers whose outputs are added must be renumbered alike and so agree on one order; `prune(..., regroup=True)`
    instead lets each layer have its own, at the price of a table of rows per layer.

    Args:
        model: plain convolutions, batch norms, linear layers, activations, poolings and additions; what else it holds
            is left as it is.
        example: an input.
        pattern: one that ties neighbouring rows; "sparsebytenn" takes "(o {4}) [i] {...}".
        density: fraction that will be kept.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> done = rearrange(net, torch.randn(1, 3, 8, 8), pattern="2-row")
        >>> done.difference < 1e-5
        True

    Raises:
        TargetError: the forward cannot be traced, or masks are attached.
        PatternError: the pattern ties no neighbouring rows.
        BudgetError: the density lies outside (0, 1].
    """
    if not 0 < density <= 1:
        raise BudgetError(f"density is the fraction that will be kept, above 0 and up to 1, got {density}")
    who, found = read(pattern), spaces(model, example)
    before = _outputs(model, example)
    moved, fixed = [], []
    for space in found:
        reason = space.fixed or _unfit(model, space, who)
        order = None if reason else _order(model, space, who, density)
        if order is None:
            fixed.append((tuple(space.writers), reason or "no order keeps more"))
        else:
            _apply(model, space, order)
            moved.append(tuple(space.writers))
    after = _outputs(model, example)
    scale = float(before.abs().max()) or 1.0
    return Rearranged(tuple(moved), tuple(fixed), float((after - before).abs().max()) / scale)


@torch.no_grad()
def _outputs(model: nn.Module, example: Tensor) -> Tensor:
    modes = [(m, m.training) for m in model.modules()]
    try:
        out = model.eval()(example)
    finally:
        for m, mode in modes:
            m.training = mode
    parts = [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]
    return torch.cat([t.flatten() for t in parts])


def _unfit(model: nn.Module, space: Space, pattern: Pattern) -> str:
    if not space.writers:
        return "no layer writes it"
    for name in space.writers:
        try:
            tied_rows(pattern, model.get_submodule(name).weight.shape)
        except PatternError as error:
            if "regrouping needs" in str(error):
                raise
            return str(error)
    return ""


def _order(model: nn.Module, space: Space, pattern: Pattern, density: float) -> Tensor | None:
    """One order for all layers that write the space: their units side by side, each layer with the same say."""
    weights = [model.get_submodule(n).weight.detach().abs() for n in space.writers]
    parts_MU = [_units(w, pattern) for w in weights]
    s_MU = torch.cat([p / p.mean().clamp_min(1e-30) for p in parts_MU], 1)
    g = tied_rows(pattern, weights[0].shape)
    order = regroup(s_MU, Pattern(f"(o {{{g}}}) [u]"), Density(density))
    return None if torch.equal(order, torch.arange(space.size, device=order.device)) else order


def _units(size: Tensor, pattern: Pattern) -> Tensor:
    """Each row's magnitudes, summed over what the pattern ties within a row: [M, U]."""
    inner = [p for p in pattern.place(size.shape) if p.dim > 0]
    tied = [i + 1 for i, p in enumerate(inner) if p.role == "tied"]
    split = size.reshape(len(size), *(p.length for p in inner))
    return (split.sum(tied) if tied else split).flatten(1)


@torch.no_grad()
def _apply(model: nn.Module, space: Space, order_M: Tensor) -> None:
    for name in (*space.writers, *space.keepers):
        module = model.get_submodule(name)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.ndim and len(tensor) == space.size:
                tensor.copy_(tensor[order_M])
    for name, repeat in space.readers:
        w = model.get_submodule(name).weight
        columns = (order_M[:, None] * repeat + torch.arange(repeat, device=order_M.device)).flatten()
        w.copy_(w[:, columns])
