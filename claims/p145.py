"""P145, Jin et al., The Journey Matters: Average Parameter Count over Pre-training, arXiv:2501.12486."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.outcome import Outcome
from gossamer.attach import Handle, attach
from gossamer.data.tasks import task
from gossamer.data.tasks.wikitext import WINDOW, Llama
from gossamer.recipes.scaling_law import Run, fit_scaling_law

CLAIM = "Pruning from 25 % to 75 % of the compute is near the best schedule, and N̄ puts sparse and dense on one curve."
PAPER = "25 % to 75 % of compute is near-optimal of 80 schedules; L = E + A/N̄^α + B/D^β for 58M to 468M (abstract)"
RULE = (
    "two-block Llama on bytes of WikiText-2, test loss: of six schedules at equal compute, 80 % zeros, three seeds, "
    "25-75 is within 1 % of the best, and within a quarter of the way from best to worst; one law fitted to dense and "
    "sparse runs by N̄ has an RMS relative error of at most 1 %, and at most half that of the same law by the last N"
)
SCHEDULES = ((0.0, 0.5), (0.25, 0.5), (0.25, 0.75), (0.25, 1.0), (0.5, 0.75), (0.5, 1.0))
BATCH, RATE = 16, 3e-3


@dataclass(frozen=True)
class _End:
    """A run's test loss in nats, and its mean and last number of weights at work, without the embedding."""

    loss: float
    average: float
    final: float


def _trained(width: int, steps: int, seed: int, density: float = 1.0, start: float = 0.25, end: float = 0.75) -> _End:
    text = task("wikitext-llama")
    torch.manual_seed(seed)
    model = Llama(width, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    handle: Handle | None = None
    if density < 1.0:
        how = {"density": density, "total_steps": steps, "start": start, "end": end, "every": max(1, steps // 100)}
        handle = attach(model, "sparse_pretraining", optimizer=optimizer, skip=["out"], **how)  # type: ignore[arg-type]
    for step in range(steps):
        now, following = text.batch(step, BATCH, seed)
        optimizer.zero_grad()
        text.loss(model(now), following).backward()
        optimizer.step(), rate.step()
        if handle:
            handle.step()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    loss = text.measure(model)["bits per byte"] * math.log(2)
    if handle is None:
        return _End(loss, linear, linear)
    report = handle.report()
    held = sum(layer.size for layer in report)
    share = 3 * report.flops.forward / report.flops.dense  # every layer has the same positions
    return _End(loss, linear - held * (1 - share), linear - held * (1 - report.density))


def _steps(compute: int, density: float, start: float, end: float) -> int:
    """Length of the run that costs as much as `compute` dense steps."""
    return round(compute * (start + (end - start) / (density + (1 - density) / 4) + (1 - end) / density))


def _sweep(width: int, compute: int, seeds: int) -> tuple[dict[str, object], bool]:
    losses = {
        (a, b): [_trained(width, _steps(compute, 0.2, a, b), s, 0.2, a, b).loss for s in range(seeds)]
        for a, b in SCHEDULES
    }
    means = {span: mean(values) for span, values in losses.items()}
    best, worst, ours = min(means.values()), max(means.values()), means[0.25, 0.75]
    told = {
        f"pruned from {a:.0%} to {b:.0%} of the compute": (
            f"loss {mean(v):.4f}, standard deviation {stdev(v):.4f}, {_steps(compute, 0.2, a, b)} steps"
        )
        for (a, b), v in losses.items()
    }
    return told, ours <= 1.01 * best and ours - best <= (worst - best) / 4


def _law(widths: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[dict[str, object], bool]:
    """Dense runs of all widths, and sparse ones of the last."""
    ends = [(_trained(width, steps, 0), steps) for width in widths for steps in lengths]
    ends += [(_trained(widths[-1], steps, 0, density), steps) for density in (0.5, 0.25, 0.1) for steps in lengths]
    tokens = lambda steps: steps * BATCH * WINDOW
    by_average = [Run(e.average, tokens(steps), e.loss) for e, steps in ends]
    by_final = [Run(e.final, tokens(steps), e.loss) for e, steps in ends]
    law, other = fit_scaling_law(by_average), fit_scaling_law(by_final)
    told: dict[str, object] = {
        f"{'sparse' if e.final < e.average else 'dense'}, N̄ {e.average:.0f}, last {e.final:.0f}, {steps} steps": (
            f"loss {e.loss:.4f}, by N̄ {law(r.parameters, r.data):.4f}"
        )
        for (e, steps), r in zip(ends, by_average)
    }
    told["law by N̄"] = f"{law.floor:.3f} + {law.a:.4g}/N̄^{law.alpha:.3f} + {law.b:.4g}/D^{law.beta:.3f}"
    told["RMS relative error by N̄"] = f"{law.error(by_average):.4f}"
    told["RMS relative error by the last N"] = f"{other.error(by_final):.4f}"
    return told, law.error(by_average) <= min(0.01, other.error(by_final) / 2)


def run(full: bool = False) -> Outcome:
    swept, near = _sweep(64, 400, 5) if full else _sweep(32, 100, 3)
    fitted, one_curve = _law((24, 32, 48, 64, 96), (400, 1200)) if full else _law((16, 24, 32, 48), (150, 400))
    return Outcome({**swept, **fitted}, near and one_curve, RULE)
