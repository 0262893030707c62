"""P069, Yang et al., S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning, arXiv:2412.06289."""

from __future__ import annotations

import time
from statistics import mean

import torch
from torch.nn import functional

import gossamer
from benchmarks.finetuning.run import kept_bytes
from claims.outcome import Outcome
from claims.questions import TASKS, Effort, Reader, accuracy, adapt_and_train, sentences
from gossamer.attach import Adapters

CLAIM = "At equal quality S2FT keeps fewer bytes and takes faster steps than LoRA, and its adapters fuse."
PAPER = "training memory and latency 10 % better than LoRA's on average; adapters decouple and fuse (abstract)"
RULE = (
    "at about equal numbers that learn: S2FT keeps fewer bytes between the passes, its fastest step is faster, its "
    "mean accuracy on two tasks is within 1 point of LoRA's or above, and its two adapters, fused, keep as much or more"
)
RATE = 1e-3  # the official script's, and usual for LoRA
# The paper's baseline: LoRA on q, k, v, up and down. Rank 5 has 184k numbers; S2FT's default layers at 3 %, 180k.
WAYS = {
    "S2FT": ("s2ft", {"density": 0.03}),
    "LoRA": (
        "lora",
        {"rank": 5, "targets": ["*query", "*key", "*value", "*intermediate.dense", "*[0-5].output.dense"]},
    ),
}


def _fitted(way: str, seed: int, effort: Effort) -> tuple[Reader, Adapters]:
    """One encoder with an adapter for each task, trained one after the other from the same start."""
    method, options = WAYS[way]
    model = Reader(seed)
    adapters = gossamer.adapt(model.encoder, method, name="trec", seed=seed, **options)
    adapters.add(method, name="reviews", seed=seed + 100, **options)
    for task in TASKS:
        adapters.use(task)
        adapt_and_train(model, adapters, task, effort, seed=seed, rate=RATE)
    return model, adapters


def _accuracies(model: Reader, adapters: Adapters, effort: Effort) -> tuple[float, float]:
    """Means over both tasks: each adapter alone, and both fused with a factor of 1."""
    alone = []
    for task in TASKS:
        adapters.use(task)
        alone.append(accuracy(model, task, effort))
    adapters.fuse("both", dict.fromkeys(TASKS, 1.0))
    adapters.use("both")
    return mean(alone), mean(accuracy(model, task, effort) for task in TASKS)


def _costs(repeats: int) -> dict[str, tuple[int, int, float]]:
    """Of each way: numbers that learn, bytes kept between passes, seconds of the fastest step; ways take turns."""
    batch, labels = sentences("reviews")["train"].batch(range(32))
    runs = {}
    for way, (method, options) in WAYS.items():
        model = Reader(0)
        adapters = gossamer.adapt(model.encoder, method, **options)
        runs[way] = model, adapters, torch.optim.AdamW(adapters.parameters(), lr=0.0)

    def step(model: Reader, adapters: Adapters, optimizer: torch.optim.Optimizer) -> None:
        functional.cross_entropy(model.heads["reviews"](model.embed(batch)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    kept = {way: kept_bytes(run[0], lambda run=run: step(*run)) for way, run in runs.items()}
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(repeats):
        for way, run in runs.items():
            began = time.perf_counter()
            step(*run)
            times[way].append(time.perf_counter() - began)
    return {way: (runs[way][1].trainable, kept[way], min(times[way])) for way in runs}


def run(full: bool = False) -> Outcome:
    effort = Effort(300, 32, 500) if full else Effort()
    costs, ours, means = _costs(30 if full else 10), {}, {}
    for way in WAYS:
        found = [_accuracies(*_fitted(way, seed, effort), effort) for seed in range(3)]
        means[way] = [100 * mean(part) for part in zip(*found)]
        learns, kept, seconds = costs[way]
        ours[way] = (
            f"{learns} numbers learn, {kept / 1e6:.1f} MB kept between passes, {1e3 * seconds:.0f} ms; "
            f"accuracy {means[way][0]:.2f} % (seeds {', '.join(f'{100 * a:.1f}' for a, _ in found)}), "
            f"fused {means[way][1]:.2f} %"
        )
    (alone, fused), (lora_alone, lora_fused) = means["S2FT"], means["LoRA"]
    cheaper = costs["S2FT"][1] < costs["LoRA"][1] and costs["S2FT"][2] < costs["LoRA"][2]
    return Outcome(ours, cheaper and alone >= lora_alone - 1 and fused >= lora_fused, RULE)
