"""One file per solver. Each has TIED (rows that share a pattern), SPARSE, and
`prepare(stack, threads)`, which returns a function that runs the stack and returns its output as a tensor."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

OURS = ("ours_unstructured", "ours_grouped4", "ours_grouped4_panels")
SPARSE_PEERS = ("torch_csr", "scipy_csr")
DENSE_ENGINES = ("torch_dense", "torch_onednn", "onnxruntime_fp32", "openvino_fp32")
ALL = OURS + SPARSE_PEERS + DENSE_ENGINES


def load(name: str) -> ModuleType:
    """The solver's module."""
    return import_module(f"benchmarks.spmm.solvers.{name}")
