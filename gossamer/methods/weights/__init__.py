"""Methods that make weights sparse: one paper, one file."""

from . import (
    essential_sparsity,
    fast_sparse_convnets,
    global_magnitude,
    gradual_magnitude,
    magnitude,
    random,
    sparsebytenn,
    sparsegpt,
    wanda,
)

__all__ = [
    "essential_sparsity",
    "fast_sparse_convnets",
    "global_magnitude",
    "gradual_magnitude",
    "magnitude",
    "random",
    "sparsebytenn",
    "sparsegpt",
    "wanda",
]
