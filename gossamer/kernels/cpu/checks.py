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
    if not fits or tensor.dtype is not torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu:
        raise FormatError(
            f"{name} must be a contiguous float32 CPU tensor {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}; call .float().contiguous()"
        )


def need_bias(rows: int, bias_M: Tensor | None) -> None:
    """Refuse a bias that is not one float32 per output row."""
    if bias_M is not None:
        need_floats("bias", bias_M, f"[{rows}]", bias_M.shape == (rows,))


def output(out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """`out` once it is seen to fit, or new memory (float32 whatever torch's default dtype is)."""
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    need_floats("out", out, str(list(shape)), tuple(out.shape) == shape)
    return out
