"""Sliced blocks: transformer blocks on a residual stream that is narrower than the model's own width.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family
from .streams import JOINTS, Place, Reading, Stack, stack_of


class StreamNorm(nn.Module):
    """x / √(Σ_i x_i² / width + ε): RMSNorm of a stream whose deleted columns still count as columns.

    Args:
        width: of the stream before anything was deleted.
        eps: the model's own ε.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"


class Joint(nn.Module):
    """shortcut(x) + branch: the residual addition, where the stream before and after it have different bases.

    Args:
        shortcut: from one basis to the other; None where they are the same.
    """

    def __init__(self, shortcut: nn.Linear | None = None) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return (x if self.shortcut is None else self.shortcut(x)) + branch


class _Sliced:
    """The forward of a sliced block: entry (first block only), then each half and its joint."""

    family: Family
    sliced_from: type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        named = {**dict(zip(self.family.positional, args)), **kwargs}
        x = hidden_states if self.entry is None else self.entry(hidden_states)
        for half, joint in zip(self.family.halves, JOINTS):
            join = self.get_submodule(joint)
            if self.family.post:
                x = join(x, half.run(self, x, named))
                x = self.get_submodule(half.norm)(x)  # looked up late: it may be replaced while a pass waits above
            else:
                x = join(x, half.run(self, self.get_submodule(half.norm)(x), named))
        return x


@functools.cache
def _sliced_class(kind: type, family: Family) -> type:
    # A subclass, so that whatever looks for the model's own blocks (recorded outputs, checkpointing) still finds them.
    return type(f"Sliced{kind.__name__}", (_Sliced, kind), {"family": family, "sliced_from": kind})


def open_joints(stack: Stack) -> None:
    """Let every block run half by half, in place; what it computes stays the same."""
    for block in stack.blocks:
        block.__class__ = _sliced_class(type(block), stack.family)
        block.register_module("entry", None)
        for joint in JOINTS:
            block.add_module(joint, Joint())


def close_joints(stack: Stack) -> None:
    """Undo `open_joints`, where no basis has changed since."""
    for block in stack.blocks:
        block.__class__ = block.sliced_from
        for name in ("entry", *JOINTS):
            delattr(block, name)


def is_sliced(model: nn.Module) -> bool:
    """Whether the model has sliced blocks."""
    return any(isinstance(m, _Sliced) for m in model.modules())


def linear_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, or of transformers' Conv1D, outputs first: [O, I], a view."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()


def put_linear(layer: nn.Module, w_OI: Tensor, bias_O: Tensor | None) -> None:
    """Give a linear layer a weight and a bias of other sizes; their dtype stays that of the old weight."""
    old = layer.weight
    plain = isinstance(layer, nn.Linear)
    stored = (w_OI if plain else w_OI.t()).to(old.dtype).contiguous()
    layer.weight = nn.Parameter(stored, requires_grad=old.requires_grad)
    bias = None if bias_O is None else nn.Parameter(bias_O.to(old.dtype), requires_grad=old.requires_grad)
    layer.register_parameter("bias", bias)
    names = ("out_features", "in_features") if plain else ("nf", "nx")
    for name, size in zip(names, w_OI.shape):
        setattr(layer, name, size)


def shortcut(w_OI: Tensor, like: Tensor, bias_O: Tensor | None = None) -> nn.Linear:
    """A linear layer that holds these values, in the dtype of another tensor."""
    layer = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=bias_O is not None, device="meta")
    put_linear(layer, w_OI.to(like), None if bias_O is None else bias_O.to(like))
    for p in layer.parameters():
        p.data, p.requires_grad = p.data.to(like.dtype), like.requires_grad
    return layer


def put_table(table: nn.Embedding, w: Tensor) -> None:
    """Give an embedding rows of another width."""
    old = table.weight
    table.weight = nn.Parameter(w.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    table.embedding_dim = w.shape[1]


def norm_eps(norm: nn.Module) -> float:
    """ε of a LayerNorm, or of any RMSNorm of transformers."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def swap_norm(place: Place, width: int) -> None:
    """Replace a norm; its scale and bias have gone into those that read what it gives."""
    block, name = place
    owner, _, last = name.rpartition(".")
    norm = block.get_submodule(name)
    setattr(block.get_submodule(owner), last, StreamNorm(width, norm_eps(norm)))


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """What `resize` needs to give the model's own class these shapes; None if no block is sliced."""
    if not is_sliced(model):
        return None
    stack = stack_of(model)
    readings = stack.readings()
    widths = [linear_weight(r.readers[0]).shape[1] for r in readings] + [linear_weight(readings[-1].writer).shape[0]]
    return {"stack": stack.name, "widths": widths, "entry": stack.blocks[0].entry is not None}


def resize(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Give a dense model (usually on the meta device) the shapes of a sliced one, in place; values are not set."""
    stack, widths = stack_of(model), list(map(int, record["widths"]))
    open_joints(stack)
    readings = stack.readings()
    if record["entry"]:
        like = linear_weight(readings[0].readers[0])
        stack.blocks[0].entry = shortcut(like.new_empty(widths[0], like.shape[1]), like)
    for table in () if record["entry"] else stack.tables(model):
        put_table(table, table.weight.new_empty(len(table.weight), widths[0]))
    for reading, (before, after) in zip(readings, itertools.pairwise(widths), strict=True):
        _resize(reading, before, after, stack.family.post)
    return model


def _resize(reading: Reading, before: int, after: int, post: bool) -> None:
    norm = None if reading.norm is None else reading.norm[0].get_submodule(reading.norm[1])
    shifted = getattr(norm, "bias", None) is not None
    for layer in reading.readers:
        w_OI = linear_weight(layer)
        put_linear(layer, *_empty(w_OI, len(w_OI), before, layer.bias is not None or shifted))
    writer = reading.writer
    w_OI = linear_weight(writer)
    put_linear(writer, *_empty(w_OI, after, w_OI.shape[1], writer.bias is not None))
    w_OI, bias_O = _empty(w_OI, after, before, post and shifted)
    reading.block.get_submodule(reading.joint).shortcut = shortcut(w_OI, w_OI, bias_O)
    if norm is not None and reading.norm is not None:
        swap_norm(reading.norm, norm_width(norm))


def _empty(like: Tensor, outputs: int, inputs: int, bias: bool) -> tuple[Tensor, Tensor | None]:
    return like.new_empty(outputs, inputs), like.new_empty(outputs) if bias else None


def norm_width(norm: nn.Module) -> int:
    """Columns that a norm was made for."""
    return norm.width if isinstance(norm, StreamNorm) else _sizes(norm)[-1]


def _sizes(norm: nn.Module) -> Sequence[int]:
    return norm.normalized_shape if isinstance(norm, nn.LayerNorm) else norm.weight.shape
