"""Turns: the places where a model's residual stream gets a new basis, and what that does to the layers around them.

Shape suffixes: N tokens, D the stream's own width, W its width now, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attach.targets import Target
from ..nn.sliced import (
    JOINTS,
    Joint,
    linear_weight,
    norm_width,
    open_joints,
    put_linear,
    put_table,
    shortcut,
    swap_norm,
)
from ..nn.streams import Family, Half, Stack


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
        before: (block, half, joint's name) that writes the stream it turns; None at the entry.
        after: (block, half, joint's name) that reads the turned stream.
    """

    target: Target
    turn: Turn
    before: tuple[nn.Module, Half, str] | None
    after: tuple[nn.Module, Half, str]

    @property
    def stamp(self) -> Tensor:
        """A weight beside the turn that is still as the model brought it: it tells whose turn this is."""
        if self.before is None:
            block, half, _ = self.after
            return linear_weight(block.get_submodule(half.readers[0])).detach()
        block, half, _ = self.before
        return linear_weight(block.get_submodule(half.writer)).detach()


def sites_of(stack: Stack) -> list[Site]:
    """Open the blocks and put a turn at the entry and behind every half but the last, which writes the first basis."""
    open_joints(stack)
    halves = [(b, h, j) for b in stack.blocks for h, j in zip(stack.family.halves, JOINTS)]
    names = [f"{stack.name}.{i}.{j}" for i in range(len(stack.blocks)) for j in JOINTS]
    first = halves[0]
    first[0].entry = Turn(_centred(*first[:2]))
    sites = [Site(Target(f"{stack.name}.0.entry"), first[0].entry, None, first)]
    for name, before, after in zip(names, halves, halves[1:]):
        joint = TurningJoint(_centred(*after[:2]))
        before[0].add_module(before[2], joint)
        sites.append(Site(Target(f"{name}.turn"), joint.turn, before, after))
    return sites


def _centred(block: nn.Module, half: Half) -> bool:
    return isinstance(block.get_submodule(half.norm), nn.LayerNorm)


def enter(site: Site, family: Family, q_DW: Tensor) -> None:
    """The stream has the new basis from here on: what reads it gets it, and the next joint leads back."""
    site.turn.q_DW = q_DW
    block, half, joint = site.after
    norm = block.get_submodule(half.norm)
    scale_D, shift_D = _affine(norm, family.scale_offset)
    for reader in map(block.get_submodule, half.readers):
        w_OD = linear_weight(reader).detach().double()
        bias_O = None if reader.bias is None else reader.bias.detach().double()
        if shift_D is not None:
            bias_O = w_OD @ shift_D + (0 if bias_O is None else bias_O)
        put_linear(reader, (w_OD if scale_D is None else w_OD * scale_D) @ q_DW, bias_O)
    swap_norm(block, half, norm_width(norm))
    block.get_submodule(joint).shortcut = shortcut(q_DW, like=linear_weight(reader))


def _affine(norm: nn.Module, offset: float) -> tuple[Tensor | None, Tensor | None]:
    scale_D, shift_D = (getattr(norm, name, None) for name in ("weight", "bias"))
    scale_D = None if scale_D is None else scale_D.detach().double() + offset
    return scale_D, None if shift_D is None else shift_D.detach().double()


def settle(site: Site, tables: Sequence[nn.Embedding]) -> None:
    """All passes are through: the turn becomes part of the weights before it, and goes."""
    if site.before is None:
        _settle_entry(site, tables)
        return
    block, half, name = site.before
    writer, joint = block.get_submodule(half.writer), block.get_submodule(name)
    if site.turn.q_DW is not None:
        map_WD = site.turn.map_WD()
        bias = None if writer.bias is None else map_WD @ writer.bias.detach().double()
        put_linear(writer, map_WD @ linear_weight(writer).detach().double(), bias)
        old = joint.shortcut.weight
        joint.shortcut = shortcut(map_WD @ old.detach().double(), like=old)
    block.add_module(name, Joint(joint.shortcut))


def _settle_entry(site: Site, tables: Sequence[nn.Embedding]) -> None:
    block, half, _ = site.after
    block.entry = None
    if site.turn.q_DW is None:
        return
    map_WD = site.turn.map_WD()
    for table in tables:
        put_table(table, table.weight.detach().double() @ map_WD.t())
    if not tables:
        block.entry = shortcut(map_WD, like=linear_weight(block.get_submodule(half.readers[0])))


def principal(gram_DD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a Gram matrix, largest first, and the eigenvectors of the first `width`: [D], [D, W]."""
    values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    return values_D.flip(0).clamp_min(0), vectors_DD.flip(1)[:, :width].contiguous()
