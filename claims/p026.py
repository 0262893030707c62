"""P026, Kurtic et al., Sparse Fine-tuning for Inference Acceleration of Large Language Models, arXiv:2310.06927.

SmolLM2-135M, SparseGPT's mask, the same steps, texts and rate for each loss. What is finished waits in the cache, so
that a run that was stopped goes on.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import gossamer.methods  # noqa: F401 - fills the registry
from claims.outcome import Outcome
from gossamer.core.files import cache_root, whole_file
from gossamer.data.language import perplexity, token_windows
from gossamer.data.models import load_model, load_tokenizer
from gossamer.data.text import wikitext2
from gossamer.recipes.prune import prune
from gossamer.recipes.recover import Distillation, recover

CLAIM = "At equal steps SquareHead with cross-entropy recovers a pruned language model better than either usual loss."
PAPER = (
    "standard loss-based fine-tuning may fail to recover accuracy, especially at high sparsities; SquareHead recovers "
    "it across model types (abstract)"
)
RULE = (
    "test perplexity after recovery is lower with cross-entropy + SquareHead than with cross-entropy, and than with "
    "cross-entropy + KL, by more than two standard errors of the difference over windows, at every density"
)
LOSSES = {
    "cross-entropy": Distillation(squarehead=0.0, cross_entropy=1.0),
    "cross-entropy + KL": Distillation(squarehead=0.0, cross_entropy=1.0, kl=1.0),
    "cross-entropy + SquareHead": Distillation(squarehead=1.0, cross_entropy=1.0),
}
RATE, LENGTH = 3e-4, 256


@dataclass(frozen=True)
class Effort:
    """densities kept; steps of two windows; seeds of the texts' draw; windows to judge by, and to calibrate with."""

    densities: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]
    test: int
    calibration: int


SHORT = Effort((0.4,), 40, (0,), 16, 16)
FULL = Effort((0.5, 0.4, 0.3), 300, (0, 1, 2), 64, 64)


class Runs:
    """All runs of an effort, each done once."""

    def __init__(self, effort: Effort) -> None:
        self.effort, self.dense, self.tokenizer = effort, load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
        self.teacher = copy.deepcopy(self.dense).bfloat16()
        self.folder = cache_root() / "claims" / "p026" / f"{effort.steps}-{effort.calibration}"

    def pruned(self, density: float):
        model = copy.deepcopy(self.dense)
        windows = self._windows("train", self.effort.calibration, seed=0, length=2 * LENGTH)
        data = [{"input_ids": w[None], "use_cache": False} for w in windows]
        prune(model, "sparsegpt", density=density, data=data, workdir=self.folder / f"pruned-{density}")
        return model

    def recovered(self, density: float, name: str, seed: int) -> list[float]:
        """Loss of each test window after recovery."""

        def train() -> list[float]:
            model = self.pruned(density)
            windows = self._windows("train", 2 * self.effort.steps, seed=100 + seed)
            batches = [{"input_ids": part} for part in windows.split(2)]
            where = self.folder / "running.safetensors"
            recover(model, self.teacher, batches, steps=self.effort.steps, lr=RATE, loss=LOSSES[name], checkpoint=where)
            losses = self.judged(model)
            where.unlink()
            return losses

        return self._once(f"{density}-{name}-{seed}", train)

    def judged(self, model) -> list[float]:
        windows = self._windows("test", self.effort.test, length=2 * LENGTH)
        return [math.log(perplexity(model, w[None])) for w in windows]

    def before(self, density: float | None) -> list[float]:
        """Loss of each test window of the dense model, or of one pruned."""
        make = lambda: self.judged(self.dense if density is None else self.pruned(density))
        return self._once(f"{density}-before", make)

    def _windows(self, part: str, count: int, *, seed: int | None = None, length: int = LENGTH):
        return token_windows(self.tokenizer, wikitext2(part), length=length, count=count, seed=seed)  # type: ignore[arg-type]

    def _once(self, name: str, make: Callable[[], list[float]]) -> list[float]:
        file: Path = self.folder / f"{name}.json"
        if not file.exists():
            made = make()
            with whole_file(file) as draft:
                draft.write_text(json.dumps(made))
        return json.loads(file.read_text())


def _over_seeds(losses: Iterable[list[float]]) -> list[float]:
    """The mean loss of each window."""
    return [fmean(of_window) for of_window in zip(*losses)]


def run(full: bool = False) -> Outcome:
    runs = Runs(FULL if full else SHORT)
    ppl = lambda losses: f"{math.exp(fmean(losses)):.2f}"
    ours, holds = {"dense perplexity": ppl(runs.before(None))}, []
    for density in runs.effort.densities:
        ours[f"density {density}, pruned"] = ppl(runs.before(density))
        ends = {n: _over_seeds(runs.recovered(density, n, s) for s in runs.effort.seeds) for n in LOSSES}
        *rivals, best = ends.values()
        for name, losses in ends.items():
            ours[f"density {density}, {name}"] = ppl(losses)
        for name, losses in zip(ends, rivals):
            gaps = [a - b for a, b in zip(losses, best)]
            error = stdev(gaps) / len(gaps) ** 0.5
            ours[f"density {density}, log-perplexity of {name} less ours"] = f"{fmean(gaps):+.4f} ± {error:.4f}"
            holds.append(fmean(gaps) > 2 * error)
    effort = runs.effort
    ours["effort"] = f"{effort.steps} steps of 2x{LENGTH} tokens, rate {RATE:g}, seeds {list(effort.seeds)}"
    return Outcome(ours, all(holds), RULE)
