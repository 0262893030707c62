"""Penalties: each has a value and its proximal step; the sibling of `select` for training that is to become sparse."""

from .group import Group

__all__ = ["Group"]
