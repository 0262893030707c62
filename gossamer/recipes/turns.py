"""Turns: the places where a model's residual stream gets a new basis, and what that does to the layers around them.

Shape suffixes: N tokens, D the stream's own width, W its width now, O outputs, I inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attach.targets import Target
from ..nn.families import Family
from ..nn.sliced import (
    Joint,
    linear_weight,
    norm_width,
    open_joints,
    put_linear,
    put_table,
    shortcut,
    swap_norm,
)
from ..nn.streams import Reading, Stack


class Turn(nn.Module):
    """Where forward passes pause, and go on in the new basis: (x − mean) Q.

    Args:
        centred: LayerNorm follows, which takes the mean away anyway; without its part along (1, ..., 1) the stream
            has the same root mean square before and after a rotation.
    """

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.q_DW: Tensor | None = None

    def centre(self, x: Tensor) -> Tensor:
        """x without its mean, where that does not count."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def forward(self, x: Tensor) -> Tensor:
        return x if self.q_DW is None else self.centre(x) @ self.q_DW.to(x)

    def map_WD(self) -> Tensor:
        """What the turn does, as the matrix that multiplies columns: Qᵀ (I − 11ᵀ/D)."""
        assert self.q_DW is not None  # asked after the visit only
        return self.centre(self.q_DW.t())


class TurningJoint(Joint):
    """A joint with a turn behind it."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.turn = Turn(centred)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.turn(super().forward(x, branch))


@dataclass(frozen=True)
class Site:
    """One turn and its surroundings.

    Args:
        target: the turn's name in the model.
        turn: itself.
        before: what writes the stream that it turns; None at the entry.
        after: what reads the turned stream.
    """

    target: Target
    turn: Turn
    before: Reading | None
    after: Reading

    @property
    def stamp(self) -> Tensor:
        """A weight beside the turn that is still as the model brought it: it tells whose turn this is."""
        layer = self.after.readers[0] if self.before is None else self.before.writer
        return linear_weight(layer).detach()


def sites_of(stack: Stack) -> list[Site]:
    """Open the blocks and put a turn at the entry and behind every half but the last, which writes the first basis."""
    open_joints(stack)
    readings = stack.readings()
    first = readings[0]
    first.block.entry = Turn(_centred(first))
    sites = [Site(Target(f"{stack.name}.0.entry"), first.block.entry, None, first)]
    for before, after in itertools.pairwise(readings):
        joint = TurningJoint(_centred(after))
        before.block.add_module(before.joint, joint)
        sites.append(Site(Target(f"{before.name}.turn"), joint.turn, before, after))
    return sites


def _norm(reading: Reading) -> nn.Module | None:
    return None if reading.norm is None else reading.norm[0].get_submodule(reading.norm[1])


def _centred(reading: Reading) -> bool:
    return isinstance(_norm(reading), nn.LayerNorm)


def enter(site: Site, family: Family, q_DW: Tensor) -> None:
    """The stream has the new basis from here on: what reads it gets it, and the next joint leads back."""
    site.turn.q_DW = q_DW
    reading, norm = site.after, _norm(site.after)
    scale_D, shift_D = _affine(norm, family.scale_offset)
    for reader in reading.readers:
        w_OD = linear_weight(reader).detach().double()
        bias_O = None if reader.bias is None else reader.bias.detach().double()
        if shift_D is not None:
            bias_O = w_OD @ shift_D + (0 if bias_O is None else bias_O)
        put_linear(reader, (w_OD if scale_D is None else w_OD * scale_D) @ q_DW, bias_O)
    if reading.norm is not None and norm is not None:
        swap_norm(reading.norm, norm_width(norm))
    like = linear_weight(reader)
    if not family.post:
        back = shortcut(q_DW, like)
    else:  # the stream itself is what the norm gave, scale and bias included
        back = shortcut(q_DW if scale_D is None else scale_D[:, None] * q_DW, like, shift_D)
    reading.block.get_submodule(reading.joint).shortcut = back


def _affine(norm: nn.Module | None, offset: float) -> tuple[Tensor | None, Tensor | None]:
    scale_D, shift_D = (getattr(norm, name, None) for name in ("weight", "bias"))
    scale_D = None if scale_D is None else scale_D.detach().double() + offset
    return scale_D, None if shift_D is None else shift_D.detach().double()


def settle(site: Site, tables: Sequence[nn.Embedding]) -> None:
    """All passes are through: the turn becomes part of the weights before it, and goes."""
    if site.before is None:
        _settle_entry(site, tables)
        return
    block, name = site.before.block, site.before.joint
    back = block.get_submodule(name).shortcut
    if site.turn.q_DW is not None:
        for layer in (site.before.writer, back):
            _lead(layer, site.turn.map_WD())
    block.add_module(name, Joint(back))


def _lead(layer: nn.Module, map_WD: Tensor) -> None:
    """Let a layer write the new basis."""
    bias_D = None if layer.bias is None else map_WD @ layer.bias.detach().double()
    put_linear(layer, map_WD @ linear_weight(layer).detach().double(), bias_D)


def _settle_entry(site: Site, tables: Sequence[nn.Embedding]) -> None:
    block = site.after.block
    block.entry = None
    if site.turn.q_DW is None:
        return
    map_WD = site.turn.map_WD()
    for table in tables:
        put_table(table, table.weight.detach().double() @ map_WD.t())
    if not tables:
        block.entry = shortcut(map_WD, like=linear_weight(site.after.readers[0]))


def principal(gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a Gram matrix, largest first, and the eigenvectors as columns: [D], [D, D]."""
    values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    return values_D.flip(0).clamp_min(0), vectors_DD.flip(1)
