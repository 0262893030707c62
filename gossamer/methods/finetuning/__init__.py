"""Methods that fine-tune a frozen model by a small change of its weights: one paper, one file."""

from . import lora, s2ft

__all__ = ["lora", "s2ft"]
