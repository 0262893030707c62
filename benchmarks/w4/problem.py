"""Weights of four bits, half of their groups of sixteen zero (W4S50), against dense engines of four bits.

All engines multiply the same weight. Dense ones store and read its zeros; so does ours where it keeps all groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import Case

NAME, TITLE = "w4", "One-token products of 4-bit weights, from memory"
# Four bits: engines differ by how they round. This bounds the error by the largest output.
TOLERANCE = 0.2
SIZES = ((4096, 4096), (11008, 4096))
CASES = [
    Case(f"{m}x{k}-{t}-{d}", {"size": f"{m}x{k}", "tokens": t, "density": d}, quick=(m, t) == (4096, 1))
    for m, k in SIZES
    for t in (1, 4)
    for d in (0.5, 1.0)
    if t == 1 or m == 4096
]
GROUPS = {"best dense 4-bit engine": ("torch_int4", "openvino_u4", "onnxruntime_nbits")}
PANEL = ("size", "tokens")
# Neighbours that share a scale in the dense engines.
SHARED = 128


@dataclass(frozen=True)
class Product:
    """y = x Wᵀ, both float32."""

    w_MK: Tensor
    x_TK: Tensor


def dense_case(case):
    return case.id.rsplit("-", 1)[0] + "-1.0"


def build(case):
    m, k = map(int, case.labels["size"].split("x"))
    draw = torch.Generator().manual_seed(m)
    w_MK = torch.randn(m, k, generator=draw)
    if case.labels["density"] < 1:
        order = torch.rand(m, k // 16, generator=draw).argsort(1).argsort(1)
        w_MK.masked_fill_((order >= k // 32).repeat_interleave(16, 1), 0)
    return Product(w_MK, torch.randn(case.labels["tokens"], k, generator=draw))


def exact(case, data):
    return data.x_TK.double() @ data.w_MK.double().T


def codes(w_MK):
    """Codes 0..15 [M, K], and scale and zero point [M, K / SHARED], as every dense engine here takes them."""
    blocks = w_MK.view(w_MK.shape[0], -1, SHARED)
    low, high = blocks.amin(2, keepdim=True).clamp(max=0), blocks.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-8)
    zero = (-low / scale).round().clamp(0, 15)
    found = ((blocks / scale).round() + zero).clamp(0, 15)
    return found.view_as(w_MK).to(torch.uint8), scale.squeeze(2), zero.squeeze(2)
