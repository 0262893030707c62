"""Solvers: for methods that alternate between choosing a support and moving the values."""

from .hessian import factor
from .sparsegpt import sparsegpt

__all__ = ["factor", "sparsegpt"]
