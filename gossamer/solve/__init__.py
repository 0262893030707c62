"""Solvers: for methods that alternate between choosing a support and moving the values."""

from .hessian import factor
from .sparsegpt import saliency, sparsegpt

__all__ = ["factor", "saliency", "sparsegpt"]
