"""Whether Triton kernels can run: on a CUDA device, or in Triton's interpreter on CPU tensors, which is for tests."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 is set: kernels then run step by step in NumPy, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cannot_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can serve this device and dtype; None when one can."""
    if dtype not in FLOATS:
        return f"Triton kernels read float32, bfloat16 and float16, the layer is {dtype}"
    if device.type == "cpu" and not interpreting():
        return "Triton kernels run on GPUs, the activations are on the CPU (TRITON_INTERPRET=1 is for tests)"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if interpreting() and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None
