"""Methods: importing this room fills the registry."""

from . import weights

__all__ = ["weights"]
