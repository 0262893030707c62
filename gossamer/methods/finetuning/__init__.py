"""Methods that fine-tune a frozen model by a small change of its weights: one paper, one file."""

from . import lora, pst, s2ft, sara

__all__ = ["lora", "pst", "s2ft", "sara"]
