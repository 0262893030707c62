"""Dead neurons: how many outputs of a network's ReLUs are zero, for some inputs or for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.errors import CalibrationError
from .batch_norm import feed

RELU = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


@dataclass(frozen=True)
class DeadNeurons:
    """Shares of all ReLU outputs, averaged over samples.

    Args:
        static: of neurons that give 0 for every sample, such as those whose links are all pruned.
        dynamic: zeros of the others: neurons that are dead for some samples and alive for others.
    """

    static: float
    dynamic: float

    @property
    def rate(self) -> float:
        """All zeros together."""
        return self.static + self.dynamic


def dead_neurons(model: nn.Module, batches: Iterable[object]) -> DeadNeurons:
    """Count the zeros that leave a network's ReLUs, whether modules or functions. Runs in evaluation mode.

    With N samples and J neurons, of which S give 0 for every sample: static = S/J, dynamic = (zeros − S·N)/(J·N). A
    neuron is one entry of a ReLU's output without its first axis, so every pixel of a channel counts by itself.

    Args:
        batches: inputs, samples first: tensors, tuples of arguments, or mappings by name; of the same size otherwise.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
        >>> net[0].weight.data = torch.tensor([[1.0], [0.0]])
        >>> dead_neurons(net, [torch.tensor([[-1.0], [1.0]])])
        DeadNeurons(static=0.5, dynamic=0.25)

    Raises:
        CalibrationError: no batches, no ReLU ran in them, or its outputs differ in shape between batches.

    Reference: Liu et al., AP: Selective Activation for De-sparsifying Pruned Neural Networks, arXiv:2212.06145.
    Departs from: there a neuron is static if its links are pruned; here if no sample wakes it, which can be seen from
        outside and also covers neurons that training left dead.
    """
    counts, modes = _Counts(), [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for batch in batches:
            counts.begin()
            with torch.no_grad(), counts:
                feed(model, batch)
    finally:
        for module, mode in modes:
            module.training = mode
    if not counts.zeros:
        raise CalibrationError("no ReLU ran, so there are no dead neurons to count; pass batches= that reach one")
    shares = torch.cat([z.flatten().double() / n for z, n in zip(counts.zeros, counts.samples)])
    asleep = (shares == 1).double().mean().item()
    return DeadNeurons(asleep, shares.mean().item() - asleep)


class _Counts(TorchDispatchMode):
    """Zeros of every ReLU's output, by neuron, added up over batches in the order in which the ReLUs run."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[Tensor] = []
        self.samples: list[int] = []
        self._turn = 0

    def begin(self) -> None:
        """A new batch: the next ReLU is the first one again."""
        self._turn = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in RELU:
            self._add((out == 0).sum(0), len(out))
        return out

    def _add(self, zeros: Tensor, samples: int) -> None:
        if self._turn == len(self.zeros):
            self.zeros.append(torch.zeros_like(zeros))
            self.samples.append(0)
        if self.zeros[self._turn].shape != zeros.shape:
            raise CalibrationError(
                f"ReLU {self._turn} gave {tuple(self.zeros[self._turn].shape)} a sample before and now "
                f"{tuple(zeros.shape)}; pass batches of the same size but for their first axis"
            )
        self.zeros[self._turn] += zeros
        self.samples[self._turn] += samples
        self._turn += 1
