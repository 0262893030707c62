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
from benchmarks.harness.environments import is_made
from benchmarks.harness.problem import Problem, load
from benchmarks.harness.run import Options, run
from gossamer.data.images import foolbox_images
from gossamer.data.models import normalise

# The network followed as a whole; `ours_pack` runs it layer by layer and is not the one to compare.
OURS = "ours"
# Compiling with torch takes a minute per network, so only a full run asks for it.
SLOW_TO_START = "torch_compile"


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


def rivals(problem: Problem, *, full: bool) -> tuple[str, ...]:
    """The dense engines of a problem that can run here without a download."""
    names = problem.groups["best dense engine"]
    able = [s.name for s in problem.solvers if s.name in names and is_made(s.environment) and s.why_not() is None]
    return tuple(name for name in able if full or name != SLOW_TO_START)


def speedups(zeros: float, *, full: bool) -> dict[str, tuple[float, str]]:
    """Per network: best dense engine's time over that of our compiled one, one thread, one run; and both in words."""
    problem = load("cnn")
    engines = rivals(problem, full=full)
    networks = sorted({case.labels["network"] for case in problem.cases})
    cases = tuple(f"{n}-{z}" for n in networks for z in (0.0, zeros))
    effort = Effort(7 if full else 3, 0.15)
    asked = Options(threads=(1,), only=(OURS, *engines), cases=cases, effort=effort, fresh=True)
    done = [o for o in run(problem, asked) if o.usable]
    found = {}
    for n in networks:
        dense = min((o for o in done if o.case == f"{n}-0.0" and o.solver in engines), key=lambda o: o.median_ms)
        ours = next(o for o in done if o.case == f"{n}-{zeros}" and o.solver == OURS)
        ratio = dense.median_ms / ours.median_ms
        words = f"{ratio:.2f}x (compiled {ours.median_ms:.2f} ms, {dense.solver} dense {dense.median_ms:.2f} ms)"
        found[n] = (ratio, f"{words}, best of {', '.join(engines)}")
    return found
