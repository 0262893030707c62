"""Methods that make weights sparse: one paper, one file."""

from . import essential_sparsity, global_magnitude, gradual_magnitude, magnitude, random, sparsegpt, wanda

__all__ = ["essential_sparsity", "global_magnitude", "gradual_magnitude", "magnitude", "random", "sparsegpt", "wanda"]
