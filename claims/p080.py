"""P080, Du et al., LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning, arXiv:2502.06820."""

from __future__ import annotations

from statistics import mean, stdev

import gossamer
from claims.outcome import Outcome
from claims.questions import Effort, Reader, accuracy, adapt_and_train

CLAIM = "Few cosine coefficients with learned frequencies fine-tune better than LoRA with as many parameters."
PAPER = "frequency-domain decomposition with carefully selected components surpasses low-rank methods (abstract)"
RULE = (
    "MiniLM on TREC questions, query and value of all layers, LoRA of rank 8 and LoCA with as many numbers that learn, "
    "places counted, each at its customary learning rate: mean test accuracy over three seeds is higher with LoCA"
)
TARGETS = ["*query", "*value"]
BUDGET = 8 * (384 + 384)  # numbers of LoRA's two factors of each weight
# Rates of LoCA's GLUE runs with the scale 1, and usual for LoRA. Places move for one cycle and ten steps: a tenth of
# the run, the paper's share, would end before their first turn.
WAYS = {
    "LoRA, rank 8": ("lora", {"rank": 8}, 1e-3),
    "LoCA, places counted": ("loca", {"coefficients": BUDGET // 3, "moving": 40}, 5e-3),
    "LoCA, coefficients alone counted, as in the paper": ("loca", {"coefficients": BUDGET, "moving": 40}, 5e-3),
}


def _fitted(way: str, seed: int, effort: Effort) -> tuple[float, int]:
    """Test accuracy, and how many numbers learnt."""
    method, options, rate = WAYS[way]
    model = Reader(seed)
    adapters = gossamer.adapt(model.encoder, method, targets=TARGETS, seed=seed, **options)
    adapt_and_train(model, adapters, "trec", effort, seed=seed, rate=rate)
    return accuracy(model, "trec", effort), adapters.trainable


def run(full: bool = False) -> Outcome:
    effort = Effort(400, 32, 500) if full else Effort(steps=100)
    found = {way: [_fitted(way, seed, effort) for seed in range(3)] for way in WAYS}
    ours: dict[str, object] = {
        way: f"{100 * mean(a for a, _ in rows):.2f} % ({', '.join(f'{100 * a:.1f}' for a, _ in rows)}), "
        f"{rows[0][1]} numbers learn"
        for way, rows in found.items()
    }
    lora, loca, _ = ([a for a, _ in rows] for rows in found.values())
    apart = [100 * (a - b) for a, b in zip(loca, lora)]
    ours["LoCA over LoRA"] = f"{mean(apart):+.2f} points, standard error {stdev(apart) / 3**0.5:.2f}"
    ours["setting"] = f"{effort.steps} steps of {effort.batch} questions, {effort.tested} test questions"
    return Outcome(ours, mean(apart) > 0, RULE)
