"""Everything that is checked before a matrix, or a file's parts, becomes a format. Shapes: M rows, K columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import FormatError

# One integer type per float width, to look at bits instead of values.
BITS_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
LARGEST_POINTER = 2**31 - 1


def nonzero_bits(values: Tensor) -> Tensor:
    """True where any bit is set: -0.0 and NaN count, +0.0 does not."""
    return values.view(BITS_OF[values.dtype]) != 0


def index_dtype(columns: int) -> torch.dtype:
    """16-bit column indices where they fit."""
    return torch.uint16 if columns <= 65536 else torch.int32


def matrix(w_MK: Tensor) -> Tensor:
    """Refuse anything but a real 2-D float matrix, in words.

    Raises:
        FormatError: another number of axes (flatten it), or another dtype (cast it).
    """
    if w_MK.dim() != 2:
        raise FormatError(f"formats store 2-D weights [M, K], got shape {tuple(w_MK.shape)}; flatten(1) it first")
    if w_MK.dtype not in BITS_OF:
        raise FormatError(f"formats store float16, bfloat16, float32 or float64 weights, got {w_MK.dtype}; cast it")
    return w_MK.detach()


def kept(w_MK: Tensor, support_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The matrix with everything outside its support at zero, and the support as a bool mask.

    Raises:
        FormatError: no 2-D float matrix, no values (a meta tensor), or a mask of another dtype or shape.
    """
    w_MK = matrix(w_MK)
    if w_MK.is_meta:
        raise FormatError("a sparse format needs real values, got a weight on the meta device; load the model first")
    if support_mask is None:
        return w_MK, nonzero_bits(w_MK).contiguous()
    if support_mask.shape != w_MK.shape or support_mask.dtype != torch.bool:
        raise FormatError(
            f"the support mask must be bool {tuple(w_MK.shape)} like the weight, "
            f"got {support_mask.dtype} {tuple(support_mask.shape)}"
        )
    mask_MK = support_mask.to(w_MK.device).contiguous()
    return torch.where(mask_MK, w_MK, w_MK.new_zeros(())), mask_MK


def pointer(counts: Tensor) -> Tensor:
    """Running int32 offsets [n + 1] from n counts.

    Raises:
        FormatError: more than 2³¹ − 1 entries; split the matrix by rows.
    """
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int64, out=offsets[1:])
    if counts.numel() and int(offsets[-1]) > LARGEST_POINTER:
        raise FormatError(f"{int(offsets[-1])} entries do not fit 32-bit offsets; split the matrix by rows")
    return offsets.int()


def owners(indptr: Tensor, count: int) -> Tensor:
    """The row (or group) that each of `count` entries belongs to: int64 [count]."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=count)


def whole(meta: Mapping[str, Any], key: str, least: int = 0, most: int = LARGEST_POINTER) -> int:
    """A whole number from a record, in range.

    Raises:
        FormatError: it is missing, no whole number, or out of range.
    """
    value = meta.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise FormatError(f"{key!r} must be a whole number from {least} to {most}, got {value!r}")
    return value


def exactly(parts: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    """The named parts, in order, on one device and contiguous; none missing, none extra.

    Raises:
        FormatError: the names differ, or the parts lie on different devices.
    """
    if set(parts) != set(names):
        raise FormatError(f"parts must be {', '.join(names)}; got {', '.join(sorted(parts)) or 'none'}")
    if len({part.device for part in parts.values()}) > 1:
        raise FormatError("parts lie on different devices; move them to one")
    return [parts[name].contiguous() for name in names]


def sized(part: Tensor, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Refuse a part of another dtype or shape than the record implies.

    Raises:
        FormatError: it has another.
    """
    if part.dtype != dtype or tuple(part.shape) != tuple(shape):
        raise FormatError(f"{name} must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}")
    return part


def floats(part: Tensor, shape: Sequence[int]) -> Tensor:
    """Refuse values that are not floats of the expected shape.

    Raises:
        FormatError: another dtype or shape.
    """
    if part.dtype not in BITS_OF:
        raise FormatError(f"values must be float16, bfloat16, float32 or float64, got {part.dtype}")
    return sized(part, "values", part.dtype, shape)


def pointer_part(indptr: Tensor, groups: int, count: int, name: str = "indptr") -> Tensor:
    """Refuse offsets that do not run from 0 to `count` without stepping back.

    Raises:
        FormatError: they do not; the parts are damaged or mixed up.
    """
    sized(indptr, name, torch.int32, [groups + 1])
    if int(indptr[0]) != 0 or int(indptr[-1]) != count or bool((indptr.diff() < 0).any()):
        raise FormatError(f"{name} must rise from 0 to the {count} stored entries; these parts are damaged or mixed up")
    return indptr


def column_part(
    indices: Tensor, indptr: Tensor, columns: int, dtype: torch.dtype | None = None, name: str = "indices"
) -> Tensor:
    """Refuse column indices outside the matrix, repeated, or out of order within a row or group.

    Args:
        dtype: of the indices; `index_dtype` of the columns if None.

    Raises:
        FormatError: there is one; the parts are damaged or mixed up.
    """
    sized(indices, name, dtype or index_dtype(columns), [indices.numel()])
    wide = indices.int()
    if wide.numel() and not 0 <= int(wide.min()) <= int(wide.max()) < columns:
        raise FormatError(f"column indices must lie in [0, {columns}), got {int(wide.min())} to {int(wide.max())}")
    steps = wide.diff() > 0
    firsts = indptr[1:-1].long()
    steps[firsts[(firsts > 0) & (firsts < wide.numel())] - 1] = True
    if not bool(steps.all()):
        raise FormatError("column indices must ascend within each row or group; these parts are damaged or mixed up")
    return indices


def zero_padding(slots: Tensor, values: Tensor, grid: tuple[int, int], shape: tuple[int, int]) -> None:
    """Refuse set bits in slots that lie outside the matrix: kernels rely on them being zero.

    Raises:
        FormatError: a slot outside holds one; the parts are damaged.
    """
    if grid == shape:
        return
    outside = (slots // grid[1] >= shape[0]) | (slots % grid[1] >= shape[1])
    if bool((outside & nonzero_bits(values)).any()):
        raise FormatError(f"slots outside the {shape[0]}x{shape[1]} matrix must hold zeros; these parts are damaged")
