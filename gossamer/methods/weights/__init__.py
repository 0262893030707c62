"""Methods that make weights sparse: one paper, one file."""

from . import (
    essential_sparsity,
    fast_sparse_convnets,
    global_magnitude,
    gradual_magnitude,
    magnitude,
    random,
    rigl,
    set,
    sparsebytenn,
    sparsegpt,
    static,
    wanda,
)

__all__ = [
    "essential_sparsity",
    "fast_sparse_convnets",
    "global_magnitude",
    "gradual_magnitude",
    "magnitude",
    "random",
    "rigl",
    "set",
    "sparsebytenn",
    "sparsegpt",
    "static",
    "wanda",
]
