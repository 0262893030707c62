"""P035, Li et al., Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, arXiv:2205.11005."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import gossamer
from claims.outcome import Outcome
from claims.questions import Effort, Reader, accuracy, adapt_and_train, train

CLAIM = "PST, which trains about 1.5 % of the numbers, prunes as well as training all of them does."
PAPER = "1.5 % trainable parameters reach comparable performance on BERT (abstract)"
RULE = (
    "on TREC, half of the encoder's weights kept, the same ramp: PST trains at most 2 % of the model's numbers, and "
    "its mean accuracy over the seeds is within 1 point of gradual magnitude pruning that trains all of the encoder's "
    "weights, or above"
)
DENSITY, BEGIN, END = 0.5, 0.1, 0.7  # the ramp of PST's official script, as shares of the run
LAYERS = ("encoder.*",)
# Rank 4 is 1.6 % of MiniLM. Rates: usual for adapters, and for all weights of a small encoder.
PST_RATE, FULL_RATE = 1e-3, 1e-4


def _pst(seed: int, effort: Effort) -> tuple[float, float, float]:
    model = Reader(seed)
    own = {"density": DENSITY, "total_steps": effort.steps, "rank": 4, "seed": seed}
    adapters = gossamer.adapt(model.encoder, "pst", targets=LAYERS, **own)
    adapt_and_train(model, adapters, "trec", effort, seed=seed, rate=PST_RATE)
    share = adapters.trainable / sum(p.numel() for n, p in model.encoder.named_parameters() if "deltas" not in n)
    zeros = adapters.merge()
    adapters.remove()
    kept = 1 - sum(r.zeros_after for r in zeros) / sum(
        model.encoder.get_submodule(r.layer).weight.numel() for r in zeros
    )
    return accuracy(model, "trec", effort), share, kept


def _full(seed: int, effort: Effort) -> tuple[float, float, float]:
    model = Reader(seed)
    ramp = {"begin": round(BEGIN * effort.steps), "until": round(END * effort.steps), "every": 1}
    own = {"density": DENSITY, "total_steps": effort.steps, "optimizer": "later", "targets": LAYERS}
    handle = gossamer.attach(model.encoder, "gradual_magnitude", **own, **ramp)
    learns = [p for n, p in model.encoder.named_parameters() if "embeddings" not in n and "pooler" not in n]
    rule = {"learns": learns, "after": handle.step, "prepare": handle.follow}
    train(model, "trec", effort, seed=seed, rate=FULL_RATE, **rule)
    handle.remove()
    weights = [model.encoder.get_submodule(t.layer).weight for t in handle.targets]
    kept = sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    share = sum(p.numel() for p in learns) / sum(p.numel() for p in model.encoder.parameters())
    return accuracy(model, "trec", effort), share, kept


def run(full: bool = False) -> Outcome:
    effort = Effort(400, 32, 500) if full else replace(Effort(), steps=60)
    ours, means, shares = {}, {}, {}
    for way, fit in {"PST": _pst, "gradual magnitude": _full}.items():
        found = [fit(seed, effort) for seed in range(3)]
        means[way], shares[way] = 100 * mean(a for a, _, _ in found), found[0][1]
        seeds = ", ".join(f"{100 * a:.1f}" for a, _, _ in found)
        ours[way] = f"{means[way]:.2f} % ({seeds}), {shares[way]:.2%} of the numbers learn, {found[0][2]:.2%} kept"
    holds = shares["PST"] <= 0.02 and means["PST"] >= means["gradual magnitude"] - 1
    return Outcome(ours, holds, RULE)
