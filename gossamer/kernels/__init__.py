"""How a stored weight is computed: `resolve` chooses a kernel once, `explain` says why."""

from gossamer.kernels import dense, gpu, ops, sparse
from gossamer.kernels.dispatch import BACKENDS, KERNELS, Plan, Refusal, explain, kernel, resolve
from gossamer.kernels.warm import warm_up

__all__ = [
    "BACKENDS",
    "KERNELS",
    "Plan",
    "Refusal",
    "dense",
    "explain",
    "gpu",
    "kernel",
    "ops",
    "resolve",
    "sparse",
    "warm_up",
]
