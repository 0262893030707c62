"""The three stacks of layers that every solver runs, with weights pruned at random.

Shapes: M output rows, K columns (a convolution's weight flattened), T tokens, C channels, H and W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

NAMES = ("conv1x1", "conv3x3", "mlp")
ZEROS = (0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Layer:
    """y = act(W x + b). `kernel` is 1 or 3 for convolutions (padding keeps the size), 0 for a linear layer."""

    w_MK: Tensor
    bias_M: Tensor
    activation: str
    kernel: int

    @property
    def w_MCHW(self) -> Tensor:
        """The weight as a convolution takes it."""
        return self.w_MK.view(self.w_MK.shape[0], -1, self.kernel, self.kernel)


@dataclass(frozen=True)
class Stack:
    """Layers in a row and their input: [1, C, H, W] for convolutions, [T, K] for the MLP."""

    name: str
    layers: tuple[Layer, ...]
    x: Tensor

    @property
    def kept_flops(self) -> float:
        """Two per kept weight and output position."""
        positions = self.x.shape[0] if self.x.dim() == 2 else self.x.shape[2] * self.x.shape[3]
        return 2.0 * positions * sum(int(layer.w_MK.count_nonzero()) for layer in self.layers)


def pruned(rows: int, cols: int, zeros: float, rows_tied: int, draw: torch.Generator) -> Tensor:
    """Random weights of which groups of `rows_tied` rows keep the same random columns; outputs keep their size."""
    kept = torch.rand(rows // rows_tied, cols, generator=draw) >= zeros
    kept_MK = kept.repeat_interleave(rows_tied, 0)
    return torch.randn(rows, cols, generator=draw) * kept_MK * (2.0 / (cols * max(1e-9, 1 - zeros))) ** 0.5


def stack(name: str, zeros: float, rows_tied: int) -> Stack:
    """Build a stack: the same seed for the same arguments, so that all solvers see the same numbers."""
    draw = torch.Generator().manual_seed(7)
    sizes, kernel, x_shape = {
        "conv1x1": ([(512, 512)] * 6, 1, (1, 512, 14, 14)),
        "conv3x3": ([(128, 128 * 9)] * 4, 3, (1, 128, 28, 28)),
        "mlp": ([(1536, 384), (384, 1536)] * 4, 0, (128, 384)),
    }[name]
    layers = tuple(
        Layer(
            pruned(rows, cols, zeros, rows_tied, draw),
            0.1 * torch.randn(rows, generator=draw),
            "none" if rows == 384 else "relu",
            kernel,
        )
        for rows, cols in sizes
    )
    return Stack(name, layers, torch.randn(*x_shape, generator=draw))


def exact_output(stack: Stack) -> Tensor:
    """The stack's output in float64."""
    x = stack.x.double()
    for layer in stack.layers:
        w, b = layer.w_MK.double(), layer.bias_M.double()
        x = x @ w.T + b if layer.kernel == 0 else conv2d(x, layer.w_MCHW.double(), b, padding=layer.kernel // 2)
        x = x.relu() if layer.activation == "relu" else x
    return x
