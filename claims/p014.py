"""P014, Zhang et al., Dynamic Sparse No Training (DSnoT), arXiv:2310.08915."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from statistics import mean

import gossamer
from claims.outcome import Outcome
from gossamer.data import perplexity

CLAIM = (
    "Trading kept for cut weights without training lowers the perplexity of Wanda and magnitude masks at 60 and 70 %."
)
PAPER = "LLaMA-7B at 70 %: 26.79 lower perplexity than Wanda; magnitude masks gain most (abstract, table 1)"
RULE = (
    "at 60 and at 70 % zeros, refined masks of both Wanda and magnitude have a lower mean loss on test windows of "
    "WikiText-2 than the masks they started from, on average over the draws of calibration windows"
)
DENSITIES = (0.4, 0.3)
FIRST = ("wanda", "magnitude")


@dataclass(frozen=True)
class Effort:
    """Windows of calibration and test text, their length, and how often calibration windows are drawn."""

    windows: int
    length: int
    draws: int


class _Subject:
    """SmolLM2, its text, and the mean loss that pruning leaves."""

    def __init__(self, effort: Effort) -> None:
        from gossamer.data import load_model, load_tokenizer, token_windows, wikitext2

        self.effort, self.model = effort, load_model("smollm2-135m")
        cut, tokenizer = dict(length=effort.length, count=effort.windows), load_tokenizer("smollm2-135m")
        text = wikitext2("train")[: 100 * effort.length * effort.windows]
        self.calibration = [token_windows(tokenizer, text, seed=d, **cut) for d in range(effort.draws)]
        self.test = token_windows(tokenizer, wikitext2("test"), **cut)

    def loss(self, method: str, density: float, draw: int, **options: object) -> float:
        """Nats per token with every linear layer but the head pruned."""
        model = copy.deepcopy(self.model)
        data = [{"input_ids": ids_T[None]} for ids_T in self.calibration[draw]]
        gossamer.prune(model, method, density=density, data=data, **options)
        return log(perplexity(model, self.test))


def _pairs(effort: Effort) -> Iterator[tuple[str, float, list[float], list[float]]]:
    """First method, density, its losses per draw, and the refined masks' losses."""
    subject, draws = _Subject(effort), range(effort.draws)
    for first in FIRST:
        for density in DENSITIES:
            alone = [subject.loss(first, density, d) for d in (draws if first == "wanda" else [0])]
            refined = [subject.loss("dsnot", density, d, initial=first) for d in draws]
            yield first, density, alone * (effort.draws // len(alone)), refined


def run(full: bool = False) -> Outcome:
    effort = Effort(24, 1024, 3) if full else Effort(4, 256, 2)
    ours, better = {}, []
    for first, density, alone, refined in _pairs(effort):
        better.append(mean(refined) < mean(alone))
        draws = ", ".join(f"{exp(a):.1f} → {exp(b):.1f}" for a, b in zip(alone, refined))
        ours[f"{first}, {1 - density:.0%} zeros"] = f"perplexity {draws}"
    ours["setting"] = (
        f"SmolLM2-135M-Instruct, {effort.windows} calibration and {effort.windows} test windows of {effort.length} "
        f"tokens of WikiText-2, {effort.draws} draws, 50 cycles, statistics block by block"
    )
    return Outcome(ours, all(better), RULE)
