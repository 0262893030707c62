"""Methods: importing this room fills the registry."""

from . import finetuning, weights

__all__ = ["finetuning", "weights"]
