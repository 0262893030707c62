"""P103, Wang et al., Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution, arXiv:2303.09650."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

import torch
from torch import nn

import gossamer.methods  # noqa: F401 - fills the registry
from claims.outcome import Outcome
from gossamer.attach import Handle, attach
from gossamer.core import Density, OneShot, Sparsifier, pattern
from gossamer.data.tasks import task
from gossamer.data.tasks.photos import doubled, psnr
from gossamer.score import magnitude

CLAIM = "At 90 % zeros ISS-P, trained from scratch, gives sharper pictures than one-shot magnitude pruning."
PAPER = "SwinIR-Lightweight and EDSR on Set5 and others, 90 to 99 % zeros: above L1-norm one-shot pruning (tables)"
RULE = (
    "small EDSR, pictures doubled, 10 % kept, equal steps, three seeds: mean PSNR on the five pictures not trained on "
    "is above that of cutting once by magnitude, after a quarter as after half of the run, by more than the standard "
    "error of the paired difference, and above bicubic interpolation"
)
Attach = Callable[[nn.Module, torch.optim.Optimizer], Handle]


def _once(at: int) -> Attach:
    """Dense up to step `at`, then the largest tenth of each layer."""
    rule = Sparsifier(magnitude, pattern("unstructured"), Density(0.1), policy=OneShot(at), name="one-shot")
    return lambda model, optimizer: attach(model, rule, optimizer=optimizer)


def _shrunk(steps: int) -> Attach:
    return lambda model, optimizer: attach(model, "iss_p", density=0.1, total_steps=steps, optimizer=optimizer)


def _trained(sparse: Attach | None, steps: int, seed: int) -> tuple[float, int]:
    """PSNR in the end, and weights that are not 0."""
    photos = task("photos-edsr")
    torch.manual_seed(seed)
    model = photos.build()
    optimizer = torch.optim.Adam(model.parameters(), photos.rate)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    handle = sparse(model, optimizer) if sparse else None
    for step in range(steps):
        small, large = photos.batch(step, photos.size, seed)
        optimizer.zero_grad()
        photos.loss(model(small), large).backward()
        optimizer.step(), rate.step()
        if handle:
            handle.step()
    if handle:
        handle.remove()
    return psnr(model), sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1)


def run(full: bool = False) -> Outcome:
    seeds, steps = (5, 8000) if full else (3, 1000)
    ways = {
        "dense": None,
        "iss_p": _shrunk(steps),
        "one-shot after a quarter": _once(steps // 4),
        "one-shot after half": _once(steps // 2),
    }
    found = {name: [_trained(way, steps, seed) for seed in range(seeds)] for name, way in ways.items()}
    sharp = {name: [p for p, _ in runs] for name, runs in found.items()}
    plain = psnr(doubled)  # type: ignore[arg-type]
    ours: dict[str, object] = {"bicubic": f"{plain:.3f} dB"}
    ours |= {n: f"{mean(values):.3f} dB, {found[n][0][1]} weights" for n, values in sharp.items()}
    held = mean(sharp["iss_p"]) > plain
    for name in ("one-shot after a quarter", "one-shot after half"):
        apart = [a - b for a, b in zip(sharp["iss_p"], sharp[name])]
        error = stdev(apart) / seeds**0.5
        ours[f"iss_p over {name}"] = f"{mean(apart):+.3f} dB, standard error {error:.3f}"
        held = held and mean(apart) > error
    return Outcome(ours, held, RULE)
