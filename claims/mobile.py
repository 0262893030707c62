"""What the claims on mobile networks share: photographs, closeness to the dense network, speed beside dense engines.

There is no ImageNet here, so quality is closeness: how often the pruned network's first answer is the dense one's, and
the Kullback-Leibler divergence of its answers from the dense ones, on photographs and their mirror images. Batch norms
are re-estimated on ten photographs after a cut, the other ten are judged: without that, every way of cutting even 30 %
of MobileNetV2 agrees with the dense network on nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.harness.conventions import Effort
from benchmarks.harness.problem import load
from benchmarks.harness.run import Options, run
from gossamer.data.images import foolbox_images
from gossamer.data.models import normalise

DENSE = ("torch_channels_last", "onnxruntime_fp32", "openvino_fp32")


def photographs(name: str) -> tuple[Tensor, Tensor]:
    """Twenty views to settle batch norms on and twenty to judge by: ten photographs each, and their mirror images."""
    x = normalise(foolbox_images().images, name)
    x = torch.cat([x, x.flip(-1)])
    return x[::2], x[1::2]


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Means and variances of all batch norms, taken anew from these views."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = 1.0
        m.train()
    model(x)
    return model.eval()


@torch.no_grad()
def answers(model: nn.Module, x: Tensor) -> Tensor:
    """Log-probabilities [views, classes]."""
    return model.eval()(x).double().log_softmax(1)


@dataclass(frozen=True)
class Closeness:
    """agreement: share of equal first answers; divergence: mean KL(dense ‖ pruned), nats."""

    agreement: float
    divergence: float

    @classmethod
    def of(cls, got: Tensor, dense: Tensor) -> Closeness:
        kl = (dense.exp() * (dense - got)).sum(1).mean()
        return cls(float((got.argmax(1) == dense.argmax(1)).double().mean()), float(kl))

    def __str__(self) -> str:
        return f"agreement {self.agreement:.3f}, KL {self.divergence:.3f}"


def speedups(zeros: float, *, rounds: int) -> dict[str, tuple[float, str]]:
    """Per network: best dense engine's time over our best time, one thread, one run; and both in words."""
    problem = load("cnn")
    ours = tuple(s.name for s in problem.solvers if s.name.startswith("ours"))
    networks = sorted({case.labels["network"] for case in problem.cases})
    cases = tuple(f"{n}-{z}" for n in networks for z in (0.0, zeros))
    asked = Options(threads=(1,), only=(*ours, *DENSE), cases=cases, effort=Effort(rounds, 0.15), fresh=True)
    done = [o for o in run(problem, asked) if o.usable]
    found = {}
    for n in networks:
        dense = min((o for o in done if o.case == f"{n}-0.0" and o.solver in DENSE), key=lambda o: o.median_ms)
        best = min((o for o in done if o.case == f"{n}-{zeros}" and o.solver in ours), key=lambda o: o.median_ms)
        ratio = dense.median_ms / best.median_ms
        words = f"{ratio:.2f}x ({best.solver} {best.median_ms:.2f} ms, {dense.solver} dense {dense.median_ms:.2f} ms)"
        found[n] = (ratio, words)
    return found
