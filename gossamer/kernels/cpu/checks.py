"""What the CPU kernels accept: they take raw addresses, so everything is checked before."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, unknown

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "relu6": 5, "hard_swish": 6}


def activation_code(activation: str) -> int:
    """The number that kernels know an activation by (`activations.NONE` and its neighbours)."""
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise unknown("activation", activation, ACTIVATIONS)
    return code


def need_floats(name: str, tensor: Tensor, shape: str, fits: bool) -> None:
    """Refuse what the kernels cannot read: they take raw addresses."""
    if not fits or tensor.dtype is not torch.float32 or not lies_flat(tensor) or not tensor.is_cpu:
        raise _unreadable(name, tensor, (torch.float32,), shape, "call .float().contiguous()")


def need_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: str, fits: bool) -> None:
    """`need_floats` for other types."""
    if not fits or tensor.dtype not in dtypes or not lies_flat(tensor) or not tensor.is_cpu:
        raise _unreadable(name, tensor, dtypes, shape, "convert or copy it")


def need_part(name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a part of a stored weight that is not what its format says."""
    if part.dtype is not dtype or tuple(part.shape) != shape or not lies_flat(part) or not part.is_cpu:
        fix = "build the format again with from_dense or from_parts"
        raise _unreadable(name, part, (dtype,), str(list(shape)), fix)


def _unreadable(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: str, fix: str) -> FormatError:
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return FormatError(
        f"{name} must be a contiguous {kinds} CPU tensor {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
        f"on {tensor.device}{'' if lies_flat(tensor) else ', not contiguous'}; {fix}"
    )


def lies_flat(tensor: Tensor) -> bool:
    """Whether a tensor is one piece of memory in the order of its axes, and its values are what stands there."""
    # A sparse tensor has no answer to is_contiguous; torch keeps some minus signs beside the memory.
    return tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_neg()


def need_counts(**counts: int) -> None:
    """Refuse numbers of things below 0."""
    for name, count in counts.items():
        if count < 0:
            raise FormatError(f"{name} must be at least 0, got {count}; give a size or a count")


def need_bias(rows: int, bias_M: Tensor | None) -> None:
    """Refuse a bias that is not one float32 per output row."""
    if bias_M is not None:
        need_floats("bias", bias_M, f"[{rows}]", bias_M.shape == (rows,))


def need_tokens(x_TK: Tensor, cols: int) -> None:
    """Refuse tokens that the decode products cannot read."""
    if x_TK.dim() != 2 or x_TK.shape[1] != cols or not lies_flat(x_TK) or not x_TK.is_cpu:
        raise FormatError(f"x must be contiguous [T, {cols}] on the CPU, got {tuple(x_TK.shape)} on {x_TK.device}")
    if x_TK.dtype not in (torch.float32, torch.bfloat16):
        raise FormatError(f"x must be float32 or bfloat16, got {x_TK.dtype}; convert it")


def need_used(panels: int, width: int, used: int, used_last: int) -> None:
    """Refuse numbers of used positions that panels of this width do not have."""
    if panels < 0 or not (0 < used <= width and 0 < used_last <= width):
        raise FormatError(
            f"used positions lie in 1..{width}, got {used} and {used_last} in the last of {panels} panels"
        )


def output(
    out: Tensor | None,
    shape: tuple[int, ...],
    reads: tuple[Tensor | None, ...] = (),
    over: tuple[Tensor | None, ...] = (),
) -> Tensor:
    """`out` once it is seen to fit, or new memory (float32 whatever torch's default dtype is).

    Args:
        out: given by the caller, or None.
        shape: of the result.
        reads: inputs that are still read while `out` is written; it must lie apart from them.
        over: inputs that `out` may be itself, but not overlap in part.
    """
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    need_floats("out", out, str(list(shape)), tuple(out.shape) == shape)
    need_apart(out, reads, over)
    return out


def need_apart(out: Tensor, reads: tuple[Tensor | None, ...], over: tuple[Tensor | None, ...] = ()) -> None:
    """Refuse an `out` that lies over what is read; arguments as in `output`."""
    if any(overlap(out, x) for x in reads if x is not None):
        raise FormatError("out overlaps an input, which is still read while out is written; give it memory of its own")
    if any(overlap(out, x) and out.data_ptr() != x.data_ptr() for x in over if x is not None):
        raise FormatError("out overlaps an input in part; it must be that input itself or lie apart")


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    return (
        a.data_ptr() < b.data_ptr() + b.numel() * b.element_size()
        and b.data_ptr() < a.data_ptr() + a.numel() * a.element_size()
    )
