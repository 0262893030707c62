"""P010, Xu et al., SparseByteNN, arXiv:2310.19509.

Both halves on real weights: the network rearranged so that like filters meet, and a 30 % sparse network's speed.
MobileNetV2 and EfficientNet-Lite0 stand in for MobileNetV1, whose weights are not at hand. A first version left the
batch norms as they were after the cut: no view was answered as the dense network does, in any order. Same rule.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.mobile import Closeness, answers, photographs, settle, speedups
from claims.outcome import Outcome
from gossamer.data.models import load_model
from gossamer.methods.weights.fast_sparse_convnets import pointwise
from gossamer.recipes.prune import prune
from gossamer.recipes.rearrange import rearrange

CLAIM = "Rearranging a whole network makes grouped kernel sparsity keep more, and 30 % sparse is faster than dense."
PAPER = "30 % sparse MobileNetV1: 1.27x over dense, 1.29x over MNN, -0.224 % top-1, Qualcomm 855 (abstract)"
RULE = (
    "MobileNetV2: rearranged outputs equal to 1e-5; at 30, 50, 70, 90 % zeros in groups of 4 it keeps more Σ|w| than "
    "in order and, up to 70 %, has a lower KL to dense; 30 % zeros above 1.1x the best dense engine on both networks"
)
ZEROS, LEAST = (0.3, 0.5, 0.7, 0.9), 1.1


def _size(model: nn.Module, layers: list[str]) -> float:
    return sum(float(model.get_submodule(n).weight.detach().abs().double().sum()) for n in layers)


def _settled(model: nn.Module, settling: Tensor, x: Tensor) -> Tensor:
    return answers(settle(copy.deepcopy(model), settling), x)


def run(full: bool = False) -> Outcome:
    dense, (settling, x) = load_model("mobilenetv2"), photographs("mobilenetv2")
    layers, want = pointwise(dense), answers(dense, x)
    ours: dict[str, object] = {"dense, batch norms settled": str(Closeness.of(_settled(dense, settling, x), want))}
    holds, worst = [], 0.0
    for zeros in ZEROS:
        moved = copy.deepcopy(dense)
        worst = max(worst, rearrange(moved, x[:2], pattern="(o {4}) [i] {...}", density=1 - zeros).difference)
        ways = {"in order": (dense, False), "rearranged": (moved, False)}
        ways |= {"each layer its own order": (dense, True)} if full else {}
        kept, close = {}, {}
        for way, (start, own) in ways.items():
            model = copy.deepcopy(start)
            prune(model, "sparsebytenn", density=1 - zeros, targets=layers, regroup=own)
            kept[way] = _size(model, layers) / _size(start, layers)
            close[way] = Closeness.of(_settled(model, settling, x), want)
            ours[f"{zeros:.0%} zeros, {way}"] = f"{kept[way]:.4f} of Σ|w| kept, {close[way]}"
        holds.append(kept["rearranged"] > kept["in order"])
        holds.append(zeros > 0.7 or close["rearranged"].divergence < close["in order"].divergence)
    fast = speedups(0.3, full=full)
    ours |= {"outputs after rearranging, relative difference": f"{worst:.1e}"}
    ours |= {f"{n}, 30 % zeros in groups of 4": words for n, (_, words) in fast.items()}
    holds += [worst < 1e-5, *(ratio > LEAST for ratio, _ in fast.values())]
    return Outcome(ours, all(holds), RULE)
