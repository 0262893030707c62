"""Solvers: for methods that alternate between choosing a support and moving the values."""

from .alps import alps
from .hessian import factor
from .sparsegpt import saliency, sparsegpt
from .swaps import Rule, expected_error, swapped

__all__ = ["alps", "Rule", "expected_error", "factor", "saliency", "sparsegpt", "swapped"]
