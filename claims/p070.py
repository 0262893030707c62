"""P070, Zhao et al., Practical Continual Forgetting for Pre-trained Vision Models (GS-LoRA++), arXiv:2501.09705."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional

import gossamer
from claims.outcome import Outcome
from gossamer.attach import Adapters
from gossamer.data.tasks.clothes import Transformer, tensors
from gossamer.data.tasks.task import lot, named_right
from gossamer.methods.finetuning.gs_lora import forgetting_loss, group_norms
from gossamer.penalty import Group

CLAIM = "Low-rank changes of few blocks, chosen by a group lasso, make a network forget a class and keep the rest."
PAPER = "it manages to forget specific classes with minimal impact on other classes (abstract)"
RULE = (
    "Fashion-MNIST, a vision transformer of four blocks of width 48, one class forgotten per seed, three seeds: on "
    "average the forgotten class is named right at most 5 % of the time, the nine others at most 2 points less often "
    "than before, and in every seed at least one block's group is exactly zero"
)
CLASSES = (0, 5, 8)  # by seed: a class that looks like others, and two that do not
STRENGTHS, BOUND, RATE, BATCH = (10.0, 20.0, 40.0, 80.0), 10.0, 1e-3, 64


@dataclass(frozen=True)
class Effort:
    """Optimizer steps: to learn all ten classes (of 128 images), and to forget one (of 64 + 64)."""

    learn: int
    forget: int


def learnt(effort: Effort, seed: int) -> nn.Module:
    """A transformer that names all ten classes."""
    torch.manual_seed(seed)
    model = Transformer(width=48)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, effort.learn)
    x, y, _, _ = tensors()
    for step in range(effort.learn):
        part = lot(len(y), step, 128, seed)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step(), decay.step()
    return model.eval()


def forget(model: nn.Module, which: int, effort: Effort, seed: int, *, strength: float, inside: float = 0.0):
    """Train adapters to forget a class; `inside` is the official way, λ times the penalty in the loss."""
    adapters = gossamer.adapt(model, "gs_lora", strength=strength, seed=seed)
    optimizer = torch.optim.Adam(adapters.parameters(), RATE)
    x, y, _, _ = tensors()
    kept, gone = (y != which).nonzero()[:, 0], (y == which).nonzero()[:, 0]
    for step in range(effort.forget):
        a, b = kept[lot(len(kept), step, BATCH, seed)], gone[lot(len(gone), step, BATCH, seed)]
        logits = model(torch.cat([x[a], x[b]]))
        loss = forgetting_loss(logits[:BATCH], y[a], logits[BATCH:], y[b], bound=BOUND)
        if inside:
            loss = loss + inside * torch.stack([Group().value(parts) for parts in _blocks(adapters)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(), adapters.step(optimizer)
    return adapters


def _blocks(adapters: Adapters) -> list[list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for delta in adapters.deltas().values():
        found.setdefault(delta.groups[0], []).extend(delta.parameters())
    return list(found.values())


def right(model: nn.Module, which: int) -> tuple[float, float]:
    """Shares of test images named right: of the class, and of the others."""
    _, _, x, y = tensors()
    return named_right(model, x[y == which], y[y == which]), named_right(model, x[y != which], y[y != which])


def chosen(effort: Effort) -> float:
    """The smallest λ that switches a block off, on a seed and a class of their own; else the largest."""
    model = learnt(effort, seed=9)
    for strength in STRENGTHS:
        if 0.0 in group_norms(forget(copy.deepcopy(model), 3, effort, 9, strength=strength)).values():
            return strength
    return STRENGTHS[-1]


def run(full: bool = False) -> Outcome:
    effort = Effort(1000, 300) if full else Effort(250, 150)
    strength = chosen(effort)
    ways = {"GS-LoRA": {"strength": strength}, "LoRA alone": {"strength": 0.0}}
    ways["penalty in the loss"] = {"strength": 0.0, "inside": 0.01}
    before: list[tuple[float, float]] = []
    after: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    norms: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for seed, which in enumerate(CLASSES):
        model = learnt(effort, seed)
        before.append(right(model, which))
        for name, options in ways.items():
            other = copy.deepcopy(model)
            norms[name].append(group_norms(forget(other, which, effort, seed, **options)))
            after[name].append(right(other, which))
    ours = {"before": _percent(before)}
    for name, rows in after.items():
        off = [sum(v == 0 for v in found.values()) for found in norms[name]]
        ours[name] = f"{_percent(rows)}; blocks exactly off: {', '.join(map(str, off))} of 4"
    gone, kept = (mean(row[i] for row in after["GS-LoRA"]) for i in (0, 1))
    lost = mean(row[1] for row in before) - kept
    ours["others lost"] = f"{100 * lost:.2f} points"
    ours["setting"] = f"{effort.learn} steps to learn, {effort.forget} to forget, λ = {strength:g} by another seed"
    every = all(0.0 in found.values() for found in norms["GS-LoRA"])
    return Outcome(ours, gone <= 0.05 and lost <= 0.02 and every, RULE)


def _percent(rows: list[tuple[float, float]]) -> str:
    gone, kept = (", ".join(f"{100 * row[i]:.1f}" for row in rows) for i in (0, 1))
    return f"class {gone} %, others {kept} %"
