"""The activations a product may end with, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, hardswish, relu6, silu

from gossamer.core.errors import unknown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "silu": silu,
    "relu6": relu6,
    "hard_swish": hardswish,
}


def activation_named(name: str) -> str:
    """The name itself when it is known. Raises UnknownName with near names."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return name


def activate(z: Tensor, name: str) -> Tensor:
    """Apply the activation of that name."""
    return ACTIVATIONS[activation_named(name)](z)


# torch's own derivatives, called directly: an operator's backward runs below autograd.
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, z: grad,
    "relu": lambda grad, z: torch.ops.aten.threshold_backward(grad, z, 0),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "silu": torch.ops.aten.silu_backward,
    "relu6": lambda grad, z: torch.ops.aten.hardtanh_backward(grad, z, 0, 6),
    "hard_swish": torch.ops.aten.hardswish_backward,
}


def activation_gradient(grad: Tensor, z: Tensor, name: str) -> Tensor:
    """The gradient before the activation, from the gradient after it and the activation's input z."""
    return GRADIENTS[activation_named(name)](grad, z)
