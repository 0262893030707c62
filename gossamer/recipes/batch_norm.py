"""Batch norms whose running statistics belong to other weights than those they are used with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.errors import CalibrationError


@torch.no_grad()
def reestimate_batch_norms(model: nn.Module, batches: Iterable[object]) -> nn.Module:
    """Take the running means and variances of all batch norms anew from these batches. In place; weights stay.

    Averaged or freshly pruned weights give other activations than those the statistics were taken from. Every batch
    counts the same (the cumulative average that torch calls `momentum=None`); all else runs in evaluation mode.

    Args:
        batches: each a tensor, a tuple of arguments, or a mapping of keyword arguments of the model.

    Raises:
        CalibrationError: there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    batches = list(batches)
    if not batches:
        raise CalibrationError("no batch to take statistics of batch norms from; pass a few hundred training examples")
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    try:
        for batch in batches:
            feed(model, batch)
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum
        for m, mode in modes:
            m.training = mode
    return model


def feed(model: nn.Module, batch: object) -> None:
    """Call the model with a tensor, a tuple of arguments, or a mapping of arguments by name."""
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, tuple | list) else (batch,)))
