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

from .streams import Family, Half, Stack, stack_of

JOINTS = ("attention_joint", "feed_joint")


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
            branch = half.run(self, self.get_submodule(half.norm)(x), named)
            x = self.get_submodule(joint)(x, branch)
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


def shortcut(w_OI: Tensor, like: Tensor) -> nn.Linear:
    """A linear layer without bias that holds these values, in the dtype of another tensor."""
    layer = nn.Linear(w_OI.shape[1], w_OI.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w_OI.to(like.device, like.dtype).contiguous(), requires_grad=like.requires_grad)
    return layer


def put_table(table: nn.Embedding, w: Tensor) -> None:
    """Give an embedding rows of another width."""
    old = table.weight
    table.weight = nn.Parameter(w.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    table.embedding_dim = w.shape[1]


def norm_eps(norm: nn.Module) -> float:
    """ε of a LayerNorm, or of any RMSNorm of transformers."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def swap_norm(block: nn.Module, half: Half, width: int) -> None:
    """Replace the norm before a half; its scale and bias have gone into the readers."""
    owner, _, name = half.norm.rpartition(".")
    norm = block.get_submodule(half.norm)
    setattr(block.get_submodule(owner), name, StreamNorm(width, norm_eps(norm)))


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """What `resize` needs to give the model's own class these shapes; None if no block is sliced."""
    if not is_sliced(model):
        return None
    stack = stack_of(model)
    readers = [block.get_submodule(half.readers[0]) for block in stack.blocks for half in stack.family.halves]
    last = stack.blocks[-1].get_submodule(stack.family.halves[-1].writer)
    widths = [linear_weight(layer).shape[1] for layer in readers] + [linear_weight(last).shape[0]]
    return {"stack": stack.name, "widths": widths, "entry": stack.blocks[0].entry is not None}


def resize(model: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Give a dense model (usually on the meta device) the shapes of a sliced one, in place; values are not set."""
    stack, widths = stack_of(model), list(map(int, record["widths"]))
    open_joints(stack)
    first = stack.blocks[0]
    if record["entry"]:
        like = linear_weight(first.get_submodule(stack.family.halves[0].readers[0]))
        first.entry = shortcut(like.new_empty(widths[0], like.shape[1]), like)
    for table in () if record["entry"] else stack.tables(model):
        put_table(table, table.weight.new_empty(len(table.weight), widths[0]))
    halves = [(block, half, joint) for block in stack.blocks for half, joint in zip(stack.family.halves, JOINTS)]
    for (block, half, joint), (before, after) in zip(halves, itertools.pairwise(widths), strict=True):
        _resize_half(block, half, joint, before, after)
    return model


def _resize_half(block: nn.Module, half: Half, joint: str, before: int, after: int) -> None:
    norm = block.get_submodule(half.norm)
    for layer in map(block.get_submodule, half.readers):
        w_OI = linear_weight(layer)
        has_bias = layer.bias is not None or getattr(norm, "bias", None) is not None
        put_linear(layer, w_OI.new_empty(len(w_OI), before), w_OI.new_empty(len(w_OI)) if has_bias else None)
    writer = block.get_submodule(half.writer)
    w_OI = linear_weight(writer)
    put_linear(writer, w_OI.new_empty(after, w_OI.shape[1]), None if writer.bias is None else w_OI.new_empty(after))
    block.get_submodule(joint).shortcut = shortcut(w_OI.new_empty(after, before), w_OI)
    swap_norm(block, half, norm_width(norm))


def norm_width(norm: nn.Module) -> int:
    """Columns that a norm was made for."""
    return norm.width if isinstance(norm, StreamNorm) else _sizes(norm)[-1]


def _sizes(norm: nn.Module) -> Sequence[int]:
    return norm.normalized_shape if isinstance(norm, nn.LayerNorm) else norm.weight.shape
