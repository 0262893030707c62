"""Methods that make weights sparse: one paper, one file."""

from . import (
    essential_sparsity,
    fast_sparse_convnets,
    global_magnitude,
    gradual_magnitude,
    grasp,
    magnitude,
    random,
    rigl,
    set,
    snip,
    sparsebytenn,
    sparsegpt,
    static,
    synflow,
    topkast,
    wanda,
)

__all__ = [
    "essential_sparsity",
    "fast_sparse_convnets",
    "global_magnitude",
    "gradual_magnitude",
    "grasp",
    "magnitude",
    "random",
    "rigl",
    "set",
    "snip",
    "sparsebytenn",
    "sparsegpt",
    "static",
    "synflow",
    "topkast",
    "wanda",
]
