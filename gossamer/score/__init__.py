"""Scores: (weight, statistics of its input) → worth of each entry, higher = kept."""

from .activation import weight_times_input_norm
from .magnitude import magnitude
from .random import Random, random, salt

__all__ = ["Random", "magnitude", "random", "salt", "weight_times_input_norm"]
