"""Methods that fine-tune a frozen model by a small change of its weights: one paper, one file."""

from . import gs_lora, loca, lora, pst, s2ft, sara, sparse_gin, sparse_spectral

__all__ = ["gs_lora", "loca", "lora", "pst", "s2ft", "sara", "sparse_gin", "sparse_spectral"]
