"""P006, Elsen et al., Fast Sparse ConvNets, arXiv:1911.09723.

The paper trains on ImageNet, which is not at hand; so its accuracy is not claimed here, and what cutting at once does
to the answers is shown only to say so.
"""

from __future__ import annotations

import gossamer.methods  # noqa: F401 - fills the registry
from claims.mobile import Closeness, answers, photographs, settle, speedups
from claims.outcome import Outcome
from gossamer.attach import attach
from gossamer.data.models import load_model
from gossamer.methods.weights.fast_sparse_convnets import pointwise

CLAIM = "Mobile networks whose 1x1 convolutions are 90 % zeros run faster than the dense networks of the best engine."
PAPER = "1.3 to 2.4x over dense equivalents of equal accuracy, Snapdragon 835 (abstract)"
RULE = (
    "MobileNetV2 and EfficientNet-Lite0, 90 % of 1x1 weights zero, both at least 1.3x the best dense engine, 1 thread"
)
LEAST = 1.3


def _cut(name: str, density: float) -> str:
    """The paper's layout on real weights, without its training: late layers in groups, the others one by one."""
    model, (settling, x) = load_model(name), photographs(name)
    dense, layers = answers(model, x), pointwise(model)
    late = len(layers) * 2 // 3
    for targets, pattern in ((layers[:late], "unstructured"), (layers[late:], "([o] {4}) [i] h w")):
        how = {"density": density, "total_steps": 1, "until": 1, "every": 1, "pattern": pattern}
        handle = attach(model, "fast_sparse_convnets", targets=targets, **how)
        handle.step()
        handle.remove()
    return str(Closeness.of(answers(settle(model, settling), x), dense))


def run(full: bool = False) -> Outcome:
    fast = speedups(0.9, full=full)
    ours: dict[str, object] = {f"{n}, 90 % zeros in groups of 4": words for n, (_, words) in fast.items()}
    for density in (0.7, 0.5, 0.1):
        ours[f"mobilenetv2 cut to {density:.0%} at once, no training"] = _cut("mobilenetv2", density)
    return Outcome(ours, all(ratio >= LEAST for ratio, _ in fast.values()), RULE)
