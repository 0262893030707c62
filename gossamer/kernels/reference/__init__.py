"""The plain torch twin of every kernel: slow, readable, on any device."""

from gossamer.kernels.reference.activation import ACTIVATIONS, activate, activation_gradient, activation_named
from gossamer.kernels.reference.panels import panels_reference
from gossamer.kernels.reference.products import spmm_reference

__all__ = ["ACTIVATIONS", "activate", "activation_gradient", "activation_named", "panels_reference", "spmm_reference"]
