"""One token by one weight that comes from memory: every call takes another copy, until none is left in any cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Case

NAME, TITLE = "decode", "One-token products, weights from memory"
TOLERANCE = 2e-5
# bfloat16 engines round their result; torch's return bfloat16.
TOLERANCES = {"torch_linear": 1e-2, "torch_onednn": 1e-2, "openvino": 1e-2, "ours_tiles": 1e-2}
SIZES, DTYPES, ZEROS = ((4096, 4096), (11008, 4096)), ("bfloat16", "float32"), (0.5, 0.7, 0.9)
CASES = [
    Case(
        f"{m}x{k}-{dtype}-{tokens}-{z}",
        {"size": f"{m}x{k}", "dtype": dtype, "tokens": tokens, "density": round(1 - z, 2)},
        quick=(m, dtype, tokens, z) == (4096, "bfloat16", 1, 0.7),
    )
    for m, k in SIZES
    for dtype in DTYPES
    for tokens in (1, 4, 8)
    for z in ZEROS
    if tokens == 1 or m == 4096
]
GROUPS = {"best dense engine": ("torch_linear", "torch_onednn", "openvino")}
PANEL = ("size", "dtype", "tokens")


@dataclass(frozen=True)
class Product:
    """y = x Wᵀ."""

    w_MK: Tensor
    x_TK: Tensor


def dense_case(case):
    """Dense engines multiply zeros like any numbers."""
    return case.id.rsplit("-", 1)[0] + "-0.5"


def build(case):
    (m, k), dtype = map(int, case.labels["size"].split("x")), getattr(torch, case.labels["dtype"])
    draw = torch.Generator().manual_seed(m)
    w_MK = torch.randn(m, k, generator=draw)
    w_MK.masked_fill_(torch.rand(m, k, generator=draw) >= case.labels["density"], 0)
    return Product(w_MK.to(dtype), torch.randn(case.labels["tokens"], k, generator=draw).to(dtype))


def exact(case, data):
    # Engines with other zeros compute another product: each is compared on its own case.
    return data.x_TK.double() @ data.w_MK.double().T


def work(case, data):
    kept = int((data.w_MK != 0).sum())
    size = data.w_MK.element_size()
    return {"flops": 2 * kept * data.x_TK.shape[0], "bytes": kept * size + data.w_MK.numel() / 8}
