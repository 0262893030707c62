"""Scores: (weight, statistics of its input) → worth of each entry, higher = kept."""

from .activation import weight_times_input_norm
from .flow import synaptic_flow, weight_times_flow
from .gradient import HessianGradient, gradient_flow, gradient_times_weight, loss_gradient
from .groups import Groups
from .magnitude import magnitude
from .random import Random, random, salt
from .relative import relative_importance
from .trial import Trial

__all__ = [
    "Groups",
    "HessianGradient",
    "Random",
    "Trial",
    "gradient_flow",
    "gradient_times_weight",
    "loss_gradient",
    "magnitude",
    "random",
    "relative_importance",
    "salt",
    "synaptic_flow",
    "weight_times_flow",
    "weight_times_input_norm",
]
