"""P074, Hu et al., SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation."""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor, nn

import gossamer
from claims.outcome import Outcome
from claims.questions import Effort, Reader, accuracy, adapt_and_train, embeddings, sentences
from gossamer.methods.finetuning.sara import sara

CLAIM = "SaRA trains only the small weights, and keeps what the model could do before better than LoRA."
PAPER = "outperforms LoRA in maintaining the model's generalization ability (abstract), on Stable Diffusion"
RULE = (
    "after fine-tuning on TREC at about equal numbers that learn: no weight of θ or more moved, a ridge probe on the "
    "encoder's embeddings of reviews, which it was not tuned on, is right more often than after LoRA, and TREC "
    "accuracy is within 2 points of LoRA's"
)
THRESHOLD, RATE = 2e-3, 5e-4  # the README's, and its default rate for it, 10⁻³·e^(−350θ)
LAYERS = ("encoder.*",)
PROBED = 600


def _probe(model: Reader, effort: Effort) -> float:
    """Reviews named right by ridge regression on embeddings of the first training reviews."""
    data = sentences("reviews")
    x_ND, y_N = embeddings(model, data["train"], PROBED), data["train"].labels[:PROBED]
    test_ND, test_N = embeddings(model, data["test"], effort.tested), data["test"].labels[: effort.tested]
    centre = x_ND.mean(0)
    x_ND, test_ND = x_ND - centre, test_ND - centre
    damped = x_ND.T @ x_ND + 0.1 * x_ND.square().sum() / len(centre) * torch.eye(len(centre))
    answer = torch.linalg.solve(damped, x_ND.T @ (2.0 * y_N - 1))
    return float(((test_ND @ answer > 0) == (test_N == 1)).float().mean())


def _small(model: nn.Module) -> int:
    """How many weights SaRA will train."""
    adapters = gossamer.adapt(model, sara(threshold=THRESHOLD), targets=LAYERS)
    count = adapters.trainable
    adapters.remove()
    return count


def _large_moved(before: dict[str, Tensor], model: nn.Module) -> int:
    """Weights of θ or more that are not what they were."""
    now = model.state_dict()
    return sum(int(((now[n] != w) & (w.abs() >= THRESHOLD)).sum()) for n, w in before.items())


def run(full: bool = False) -> Outcome:
    effort = Effort(400, 32, 500) if full else Effort()
    plain = Reader(0)
    start = {n: p.clone() for n, p in plain.encoder.state_dict().items() if p.is_floating_point()}
    count = _small(plain.encoder)
    rank = round(count / gossamer.adapt(plain.encoder, "lora", rank=1, targets=LAYERS).trainable)
    options = {
        "SaRA": ("sara", {"threshold": THRESHOLD, "total_steps": effort.steps}),
        "LoRA": ("lora", {"rank": rank}),
    }
    ours: dict[str, object] = {"before": f"probe {100 * _probe(Reader(0), effort):.2f} %"}
    means, moved = {}, 0
    for way, (method, own) in options.items():
        found = []
        for seed in range(3):
            model = Reader(seed)
            adapters = gossamer.adapt(model.encoder, method, targets=LAYERS, seed=seed, **own)
            adapt_and_train(model, adapters, "trec", effort, seed=seed, rate=RATE)
            learns = adapters.trainable
            adapters.merge(), adapters.remove()
            moved += _large_moved(start, model.encoder) if way == "SaRA" else 0
            found.append((100 * accuracy(model, "trec", effort), 100 * _probe(model, effort)))
        means[way] = [mean(part) for part in zip(*found)]
        ours[way] = (
            f"{learns} numbers learn; TREC {means[way][0]:.2f} % ({', '.join(f'{t:.1f}' for t, _ in found)}), probe "
            f"{means[way][1]:.2f} % ({', '.join(f'{p:.1f}' for _, p in found)})"
        )
    ours["weights of θ or more that SaRA moved"] = moved
    (task, probe), (lora_task, lora_probe) = means["SaRA"], means["LoRA"]
    return Outcome(ours, moved == 0 and probe > lora_probe and task >= lora_task - 2, RULE)
