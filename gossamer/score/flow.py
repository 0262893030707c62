"""Synaptic flow: how much of what enters a network leaves it by way of each weight, with no data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import Stats
from gossamer.core.errors import CalibrationError
from gossamer.core.stats import statistic

from .gradient import times
from .trial import Trial, call, inputs_of, inside, require_reached


def weight_times_flow(w: Tensor, stats: Stats) -> Tensor:
    """|w|·∂R/∂|w|, where R is the summed output of the network of absolute weights on an input of ones.

    Args:
        w: weight.
        stats: needs "flow" of the weight's shape, see `synaptic_flow`.

    Law: without biases, and with units that keep scale (ReLU, pooling), each layer that all paths cross has the same
    sum, R.

    Raises:
        CalibrationError: "flow" is missing or of another layer.
        NonFiniteError: "flow" holds NaN or infinity: R overflows float64, so rescale the weights.

    Example:
        >>> weight_times_flow(torch.tensor([[-2.0, 1.0]]), {"flow": torch.tensor([[0.5, 3.0]])}).tolist()
        [[1.0, 3.0]]

    Reference: Tanaka et al., SynFlow, arXiv:2006.05467.
    """
    return times(w, statistic(stats, "flow", w.shape)).abs()


def synaptic_flow(model: nn.Module, weights: Mapping[str, Tensor], trial: Trial) -> dict[str, dict[str, Tensor]]:
    """A probe: {"flow": ∂R/∂|w|} of each weight, in float64, for R grows with depth beyond float32's range.

    All parameters and buffers (biases, norms and their statistics too) are absolute and all dropout is off. Of the
    first batch only the shape of one sample is used; numbers that index, such as token ids, stay what they are.

    Raises:
        CalibrationError: the model fails on such an input, or a weight has no part in its output.
    """
    inputs = _ones(inputs_of(trial.batches[0]))
    own = {id(model.get_parameter(n)) for n in weights}  # a tied weight has other names as well
    others = {n: p for n, p in model.named_parameters() if id(p) not in own}
    held = {**others, **dict(model.named_buffers()), **weights}
    # What counts or indexes stays as it is: `inside` gives the model copies of its buffers.
    positive = {n: x.detach().abs().double() for n, x in held.items() if x.is_floating_point()}
    leaves = {n: positive[n].requires_grad_() for n in weights}
    modes = [(m, m.training) for m in model.modules()]
    try:
        found = inside(model.eval(), positive, lambda m: _flow(m, inputs, leaves))
    finally:
        for module, mode in modes:
            module.training = mode
    return {n: {"flow": x} for n, x in found.items()}


def _flow(model: nn.Module, inputs: Any, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    total = _first_tensor(call(model, inputs)).sum()
    flows = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {n: x for n, x in zip(leaves, flows) if x is not None}
    require_reached(leaves, set(found))
    return found


def _ones(inputs: Any) -> Any:
    """One sample of ones, of the inputs' shape."""
    if isinstance(inputs, Tensor):
        one = inputs[:1]
        return torch.ones_like(one, dtype=torch.float64) if one.is_floating_point() else one
    if isinstance(inputs, Mapping):
        return {name: _ones(x) for name, x in inputs.items()}
    return tuple(_ones(x) for x in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise CalibrationError(f"the model returns {type(output).__name__}; return a tensor, or one first in a tuple")
