"""unpack: a packed model back to plain layers, bit for bit."""

from __future__ import annotations

import copy

from torch import nn

from .fuse import put, undo_fusion
from .layers import matrix_of, packed_layers


def unpack(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Turn every packed layer into the dense layer it was, and put fused activations back in their places.

    Weights come back bit for bit, as `nn.Linear`, transformers' `Conv1D`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

    Args:
        inplace: change the model itself instead of a copy.

    Example:
        >>> dense = unpack(packed)  # doctest: +SKIP
    """
    model = model if inplace else copy.deepcopy(model)
    for name, layer in packed_layers(model).items():
        # The activation goes back to its own module below, so the layer hands it over first.
        matrix_of(layer).activation = "none"
        dense = layer.unpack()
        if not name:
            return dense
        put(model, name, dense)
    undo_fusion(model)
    model.__dict__.pop("gossamer_report", None)
    return model
