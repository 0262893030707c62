"""The network that every solver trains, from the same weights on the same pictures.

Shapes: T pictures of a batch, K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gossamer.data import fashion_mnist

PIXELS, WIDTH, CLASSES = 784, 4096, 10


@dataclass(frozen=True)
class Start:
    """Where training starts: dense layers whose pruned weights are zero, the masks of the first two, one batch."""

    layers: tuple[nn.Linear, nn.Linear, nn.Linear]
    masks: tuple[Tensor, Tensor]
    x_TK: Tensor
    y_T: Tensor


def pictures(part) -> Tensor:
    """Pictures as rows of numbers around zero."""
    return (part.images.reshape(-1, PIXELS).float() / 255 - 0.2860) / 0.3530


def start(batch: int, density: float, seed: int = 0) -> Start:
    """Random masks of an exact count, and uniform weights within 1/sqrt(kept inputs)."""
    rng = torch.Generator().manual_seed(seed)
    layers, masks = [], []
    for rows, cols in ((WIDTH, PIXELS), (WIDTH, WIDTH), (CLASSES, WIDTH)):
        share = density if rows == WIDTH else 1.0
        mask = torch.zeros(rows * cols, dtype=torch.bool)
        mask[torch.randperm(rows * cols, generator=rng)[: round(share * rows * cols)]] = True
        mask = mask.view(rows, cols)
        bound = (share * cols) ** -0.5
        layer = nn.Linear(cols, rows)
        with torch.no_grad():
            layer.weight.copy_((torch.rand(rows, cols, generator=rng) * 2 - 1) * bound * mask)
            layer.bias.zero_()
        layers.append(layer)
        masks.append(mask)
    data = fashion_mnist().train
    return Start(tuple(layers), tuple(masks[:2]), pictures(data)[:batch].contiguous(), data.labels[:batch])


class Masked(nn.Module):
    """A dense layer whose weight is multiplied by its mask at each call: how masks are usually trained."""

    def __init__(self, dense: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(dense.weight.detach().clone()), nn.Parameter(dense.bias.detach().clone())
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def chain(first: nn.Module, second: nn.Module, last: nn.Linear) -> nn.Sequential:
    """The network from its two large layers; the small one is copied."""
    copy = nn.Linear(last.in_features, last.out_features)
    copy.load_state_dict(last.state_dict())
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), copy)


def masked(data: Start) -> nn.Sequential:
    """The network with its masks multiplied in."""
    first, second, last = data.layers
    return chain(Masked(first, data.masks[0]), Masked(second, data.masks[1]), last)


def loss_of(net: nn.Module, x_TK: Tensor, y_T: Tensor) -> Tensor:
    """Cross entropy of a batch."""
    return cross_entropy(net(x_TK), y_T)


def gradients(loss: Tensor, net: nn.Sequential, data: Start) -> tuple[Tensor, ...]:
    """The loss, and gradients of all weights and biases; those of masked layers at their kept entries."""
    found = [loss.detach()]
    for layer, mask in zip((net[0], net[2], net[4]), (*data.masks, None)):
        gradient = weight_of(layer).grad
        found.append(gradient[mask] if mask is not None and gradient.dim() == 2 else gradient.reshape(-1))
        found.append(layer.bias.grad)
    return tuple(found)


def weight_of(layer: nn.Module) -> Tensor:
    """The parameter that holds a layer's weights, dense or packed."""
    return layer.values if hasattr(layer, "values") else layer.weight


def held(tensors: Iterable[object]) -> float:
    """Bytes of the memory behind these tensors, each counted once."""
    return float(sum({t.data_ptr(): t.nbytes for t in tensors if isinstance(t, Tensor)}.values()))


def training_bytes(net: nn.Module, optimizer: torch.optim.Optimizer, extra: Iterable[Tensor] = ()) -> float:
    """Bytes of weights, gradients, optimizer state, masks or indices, and whatever else a solver keeps."""
    params, state = list(net.parameters()), [t for s in optimizer.state.values() for t in s.values()]
    return held([*params, *(p.grad for p in params), *state, *net.buffers(), *extra])
