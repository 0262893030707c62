"""The main demo: all-MiniLM-L6-v2, pruned, recovered, packed and measured beside the best dense engines.

Quality: a linear probe on the sentence embeddings of Rotten Tomatoes reviews, by five-fold cross-validation, so that
every review is held out once. Calibration and recovery read other texts (IMDB sentences), without labels.
"""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import need
from ..data import embed, encode_batches, fetch, load_model, load_tokenizer, movie_reviews
from ..deploy import pack, report_of, save
from ..deploy.tensors import memory_bytes
from ..recipes.prune import prune
from ..recipes.recover import recover
from ..report.machine import hardware, versions
from ..report.packed import layer_rows
from ..report.record import Run, Setting
from .stages import Stages
from .timing import encoder_rows, folder_bytes

Progress = Callable[[str, int, int], None]
PROBE = "probe accuracy"


@dataclass(frozen=True)
class Plan:
    """One way to make the model sparse.

    Args:
        name: what the reader sees.
        pattern: who competes with whom.
        density: fraction of the encoder's weights kept.
        steps: recovery steps; 0 = none.
    """

    name: str
    pattern: str
    density: float
    steps: int = 0


# Groups of four rows share a support, and all groups of a matrix compete: the pattern chosen for speed.
ROWS = "([o] {4}) [i]"
RECOVER_LR = 5e-3
# Exporting to the dense engines, starting every worker, and compiling each packed model for each number of threads.
START_SECONDS = 110.0
# Each goes on from the one before.
PLANS = (
    Plan("rows by 4, 70 % zeros, recovered", ROWS, 0.3, steps=400),
    Plan("rows by 4, 80 % zeros, recovered", ROWS, 0.2, steps=400),
)


def run(
    out: Path,
    *,
    seconds: float = 300.0,
    measure_seconds: float | None = None,
    progress: Progress | None = None,
    plans: Sequence[Plan] = PLANS,
    reviews: int | None = None,
) -> Run:
    """Run the demo and save the packed models under `out`.

    Args:
        out: folder for the packed models.
        seconds: about how long it may take; recovery and measuring are cut to fit.
        measure_seconds: how long to measure speed; what is left of `seconds` when None.
        progress: called with (what, done, total).
        plans: the settings to show; each goes on from the one before, so densities must fall.
        reviews: how many to judge quality on; all 8,530 when None.
    """
    began = time.perf_counter()
    stage = Stages(progress, 3 + 3 * len(plans))
    with stage("fetching the model and the reviews"):
        fetch("minilm"), fetch("movie-reviews")
        dense, tokenizer = load_model("minilm"), load_tokenizer("minilm")
        task, sentences = _Task(tokenizer, reviews), _sentences(4000)
        example = _example(tokenizer, sentences)
    with stage("reading the reviews with the dense model"):
        # The same dense weights through oneDNN where that measures faster: the embeddings do not care.
        dense_quick = pack(dense, example, repeats=3, remeasure=True)
        want = task.answers(dense_quick)
        dense_bytes = folder_bytes(save(dense, out / "dense", tokenizer=tokenizer))
    made: list[_Made] = []
    for plan in plans:
        before = made[-1] if made else None
        made.append(_make(plan, before, dense, tokenizer, sentences, example, task, want, out, stage, seconds / 8))
    left = measure_seconds or max(20.0, seconds - (time.perf_counter() - began) - START_SECONDS)
    with stage("measuring all engines"):
        packed = {m.setting.name: m.model for m in made}
        rows, missing = encoder_rows(dense, packed, example, seconds=left, progress=stage.inner)
    settings = [Setting("dense", {PROBE: task.accuracy(want)}, PROBE, None, dense_bytes, memory_bytes(dense), 1.0, 0.0)]
    return Run(
        title="all-MiniLM-L6-v2 on Rotten Tomatoes reviews",
        hardware=hardware(),
        versions=versions(),
        settings=[*settings, *(m.setting for m in made)],
        engines=rows,
        layers=[row for m in made for row in m.layers],
        notes=(*NOTES, *(m.note for m in made), *missing),
        command="gossamer demo",
        load_lines=_load_lines(out / made[-1].folder),
    )


def _load_lines(folder: Path) -> tuple[str, str]:
    return (
        "import gossamer, transformers; "
        f'model, tokenizer = gossamer.load("{folder}"), transformers.AutoTokenizer.from_pretrained("{folder}")',
        'print(model(**tokenizer("a gossamer film", return_tensors="pt")).last_hidden_state.mean(1))',
    )


NOTES = (
    "Probe accuracy: logistic regression on the embeddings, five-fold cross-validation, every review held out once.",
    "Agreement: share of reviews on which the probe of the sparse model answers as the probe of the dense one.",
    "Calibration (SparseGPT) and recovery (SquareHead distillation) read IMDB sentences without labels.",
    "Each setting goes on from the one before: pruned further, recovered again.",
    "Rows by 4: groups of four output rows share one support; all groups of a matrix compete, pattern ([o] {4}) [i].",
    "Latency is of one sentence of up to 64 tokens, throughput of 32 padded or cut to 64.",
    "The token embeddings (47 MB of the dense model) are not pruned: they are looked up, not multiplied.",
)


@dataclass(frozen=True)
class _Made:
    setting: Setting
    pruned: nn.Module
    model: nn.Module
    folder: str
    layers: list
    note: str


def _make(
    plan: Plan, before: _Made | None, dense: nn.Module, tokenizer, sentences: list[str], example: Mapping[str, Tensor],
    task: _Task, want: Tensor, out: Path, stage: Stages, recover_seconds: float,
) -> _Made:  # fmt: skip
    began, model = time.perf_counter(), copy.deepcopy(before.pruned if before else dense)
    with stage(f"pruning: {plan.name}"):
        calibration = encode_batches(tokenizer, sentences[:512], batch_size=64)
        done = prune(model, "sparsegpt", density=plan.density, pattern=plan.pattern, data=calibration)
    with stage(f"recovering: {plan.name}"):
        if plan.steps:
            batches = _shuffled_batches(tokenizer, sentences[512:], 32)
            recover(
                model, dense, batches, steps=plan.steps, seconds=recover_seconds, lr=RECOVER_LR, progress=stage.inner
            )
    seconds = time.perf_counter() - began + (before.setting.seconds_to_make if before else 0.0)
    with stage(f"packing: {plan.name}"):
        packed = pack(model, example, remeasure=True)
        folder = re.sub(r"\W+", "-", plan.name).strip("-")
        size = folder_bytes(save(packed, out / folder, tokenizer=tokenizer))
        got = task.answers(packed)
    report = report_of(packed)
    setting = Setting(
        plan.name, {PROBE: task.accuracy(got)}, PROBE, float((got == want).float().mean()),
        size, report.bytes_after, done.density, seconds,
    )  # fmt: skip
    error = _paired_error(got == task.labels, want == task.labels)
    note = f"{plan.name}: the standard error of its accuracy difference to dense is {100 * error:.2f} points."
    return _Made(setting, model, packed, folder, layer_rows(plan.name, report), note)


class _Task:
    """Rotten Tomatoes reviews, and what a linear probe on their embeddings answers."""

    def __init__(self, tokenizer, reviews: int | None) -> None:
        halves = movie_reviews()
        pairs = [*zip(halves.train.texts, halves.train.labels), *zip(halves.test.texts, halves.test.labels)]
        random.Random(0).shuffle(pairs)  # the set comes sorted by label
        self.texts, labels = zip(*pairs[:reviews])
        self.labels = torch.tensor(labels)
        self.tokenizer = tokenizer

    def answers(self, model: nn.Module) -> Tensor:
        """The probe's answer for each review, given by a probe that was not trained on it."""
        linear, chosen = need("sklearn.linear_model", "demo"), need("sklearn.model_selection", "demo")
        x = embed(model, self.tokenizer, self.texts).numpy()
        folds = chosen.StratifiedKFold(5, shuffle=True, random_state=0)
        probe = linear.LogisticRegression(C=3.0, max_iter=1000)
        return torch.from_numpy(chosen.cross_val_predict(probe, x, self.labels.numpy(), cv=folds))

    def accuracy(self, answers: Tensor) -> float:
        return float((answers == self.labels).float().mean())


def _paired_error(right: Tensor, dense_right: Tensor) -> float:
    """Standard error of the difference of two accuracies on the same texts."""
    return float((right.float() - dense_right.float()).std() / len(right) ** 0.5)


def _sentences(count: int) -> list[str]:
    """Sentences of IMDB reviews, of the length of a Rotten Tomatoes review, in a fixed random order."""
    reviews = movie_reviews("imdb").train.texts
    parts = [s.strip() for r in reviews[: count // 2] for s in re.split(r"(?<=[.!?])\s+|<br />", r)]
    parts = [s for s in parts if 40 < len(s) < 250]
    random.Random(0).shuffle(parts)
    return parts[:count]


def _shuffled_batches(tokenizer, sentences: Sequence[str], size: int) -> list[dict[str, Tensor]]:
    """Batches of like lengths (little padding), in random order."""
    batches = encode_batches(tokenizer, sorted(sentences, key=len), batch_size=size)
    random.Random(1).shuffle(batches)
    return batches


def _example(tokenizer, sentences: Sequence[str]) -> dict[str, Tensor]:
    """What speed is measured on: 32 sentences, padded or cut to 64 tokens."""
    texts = [" ".join(sentences[i : i + 3]) for i in range(0, 96, 3)]
    return dict(tokenizer(texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt"))
