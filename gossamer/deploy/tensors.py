"""Tensors: everything a model holds in memory, each once, and how it goes to disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..formats import Bitmask
from ..formats.bitmask import READ_AHEAD, row_bytes
from ..formats.checks import BITS_OF
from ..nn.linear import PackedLinear

# Above this density a bit per entry and the offsets cost more than the zeros they leave out.
COMPRESS_BELOW = 0.9


@dataclass(frozen=True, eq=False)
class Held:
    """One tensor of a model.

    Args:
        module: dotted name of the module that holds it.
        attribute: its name there.
        kind: "parameter", "buffer" or "attribute" (a tensor that no register knows).
        tensor: itself.
    """

    module: str
    attribute: str
    kind: str
    tensor: Tensor

    @property
    def name(self) -> str:
        """Dotted name."""
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


def held(model: nn.Module) -> Iterator[Held]:
    """Every tensor of a model, non-persistent buffers and plain attributes too; tied ones as often as they stand."""
    for name, module in model.named_modules(remove_duplicate=False):
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
            yield from (Held(name, a, kind, t) for a, t in table.items() if t is not None)
        plain = ((a, t) for a, t in module.__dict__.items() if isinstance(t, Tensor))
        yield from (Held(name, a, "attribute", t) for a, t in plain)


def once(model: nn.Module) -> tuple[dict[str, Held], dict[str, str]]:
    """Tensors by name, each once, and for every other place the name it is tied to."""
    first: dict[object, str] = {}
    unique, aliases = {}, {}
    for h in held(model):
        t = h.tensor
        # Views of all of one memory are one tensor; empty and meta tensors have no address to compare.
        key = (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) if t.numel() and not t.is_meta else id(t)
        if key in first:
            aliases[h.name] = first[key]
        else:
            first[key] = h.name
            unique[h.name] = h
    return unique, aliases


def size(t: Tensor) -> int:
    """Bytes of its entries."""
    return t.numel() * t.element_size()


def memory_bytes(model: nn.Module) -> int:
    """All tensors, and what the kernels of packed layers laid out beside them."""
    extra = sum(m.plan.extra_nbytes for m in model.modules() if isinstance(m, PackedLinear))
    return sum(size(h.tensor) for h in once(model)[0].values()) + extra


def kept_entries(t: Tensor) -> int:
    """Entries that are not zero."""
    t = t.detach()
    return int(t.count_nonzero() if t.dtype in BITS_OF else (t != 0).sum())


def compressible(h: Held) -> bool:
    """Whether a tensor's zeros are worth leaving out on disk: a float matrix of density under 0.9."""
    t = h.tensor
    if t.dtype not in BITS_OF or t.dim() < 2 or t.numel() == 0 or h.kind == "attribute":
        return False
    return kept_entries(t) < COMPRESS_BELOW * t.numel()


def compress(t: Tensor) -> Bitmask:
    """A tensor of any rank as a bitmask of its rows."""
    rows = t.detach().reshape(t.shape[0], -1)
    return Bitmask.from_dense(rows, rows != 0)


def compressed_size(t: Tensor) -> int:
    """Bytes of `compress(t)`, without making it."""
    rows, cols = t.shape[0], t[0].numel()
    return rows * row_bytes(cols) + 4 * (rows + 1) + (kept_entries(t) + READ_AHEAD) * t.element_size()


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the tensors as `save` writes them, before headers."""
    inside = packed_parts(model)
    total = 0
    for name, h in once(model)[0].items():
        total += compressed_size(h.tensor) if name not in inside and compressible(h) else size(h.tensor)
    return total


def packed_parts(model: nn.Module) -> set[str]:
    """Names of the tensors that belong to sparse formats, which are stored as they are."""
    return {
        f"{name}.{part}" if name else part
        for name, m in model.named_modules()
        if isinstance(m, PackedLinear) and m.fmt.name != "dense"
        for part in m.fmt.PARTS
    }


def plain(t: Tensor) -> Tensor:
    """A tensor as a file takes it: on the CPU, contiguous, alone in its memory."""
    t = t.detach().cpu().contiguous()
    return t.clone() if t.untyped_storage().nbytes() != size(t) else t


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")
