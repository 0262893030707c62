"""How a support is stored: dense, CSR, bitmask (by rows or tiles), N:M, row-grouped, block, kernel patterns, int4.

Round trips are lossless, bit for bit, but for `Int4Groups`, which states its error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.core.errors import unknown
from gossamer.formats.bitmask import Bitmask
from gossamer.formats.block import Block
from gossamer.formats.csr import CSR
from gossamer.formats.dense import Dense
from gossamer.formats.format import Format
from gossamer.formats.int4groups import Int4Groups
from gossamer.formats.kernelpatterns import KernelPatterns
from gossamer.formats.nm import NM
from gossamer.formats.rowgrouped import RowGrouped
from gossamer.formats.tilebitmask import TileBitmask

FORMATS: dict[str, type[Format]] = {
    cls.name: cls for cls in (Dense, CSR, Bitmask, NM, RowGrouped, Block, TileBitmask, Int4Groups, KernelPatterns)
}

__all__ = [
    "CSR",
    "FORMATS",
    "NM",
    "Bitmask",
    "Block",
    "Dense",
    "Format",
    "Int4Groups",
    "KernelPatterns",
    "RowGrouped",
    "TileBitmask",
    "format_from",
    "format_named",
]


def format_named(name: str) -> type[Format]:
    """The format class of that name. Raises UnknownName with near names."""
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    return FORMATS[name]


def format_from(meta: Mapping[str, Any], parts: Mapping[str, Tensor]) -> Format:
    """Rebuild a stored weight from what `meta()` and `parts()` gave, checking everything.

    Args:
        meta: the record, `{"format": "csr", "rows": ..., "cols": ...}` and the format's own options.
        parts: the tensors by name.

    Raises:
        UnknownName: no format has the record's name.
        FormatError: the parts disagree with the record or with each other; the file is damaged or mixed up.

    Example:
        >>> stored = CSR.from_dense(torch.eye(3))
        >>> format_from(stored.meta(), stored.parts()).nnz
        3
    """
    return format_named(str(meta.get("format"))).from_parts(parts, meta)
