"""Whole networks as data of a problem: the pruned network and its input, exact outputs, exported files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.engines.exporting import export_network
from gossamer.deploy.examples import call, tensors


@dataclass(frozen=True)
class Network:
    """A network in eval mode and one input, a tensor or tensors by name."""

    model: nn.Module
    example: Tensor | Mapping[str, Tensor]

    def output(self, model: nn.Module | None = None) -> Tensor:
        """The first output, of this model or of another made from it."""
        with torch.inference_mode():
            return next(tensors(call(self.model if model is None else model, self.example)))

    def exact(self) -> Tensor:
        """The first output in float64."""
        model = copy.deepcopy(self.model).double()
        example = self.example
        wide = example.double() if isinstance(example, Tensor) else example
        return Network(model, wide).output()

    def export(self, folder: Path) -> None:
        """What engines read."""
        export_network(self.model, self.example, folder)
