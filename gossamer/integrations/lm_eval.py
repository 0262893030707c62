"""Zero-shot tasks through lm-eval on packaged texts: nothing is downloaded but the packaged sets themselves."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import CalibrationError, need, unknown
from ..data.text import LabelledTexts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

ORDER_SEED = 0


@dataclass(frozen=True)
class ZeroShotTask:
    """A question with a few answers, of which the model's likeliest counts.

    Args:
        texts: → the labelled texts; called when the task is run.
        prompt: with {text} where the text goes.
        answers: in the order of the labels; what the model is asked to go on with after the prompt and a space.
    """

    texts: Callable[[], LabelledTexts]
    prompt: str
    answers: tuple[str, ...]

    def config(self, name: str, count: int | None) -> dict[str, object]:
        """lm-eval's own form of this task.

        Args:
            count: texts, drawn at random but always the same; None = all.
        """
        return {
            "task": name,
            "custom_dataset": lambda **_: {"test": self._drawn(count)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": self.prompt.replace("{text}", "{{text}}"),
            "doc_to_choice": list(self.answers),
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }

    def _drawn(self, count: int | None):
        held = self.texts()
        if count is not None and not 1 <= count <= len(held):
            raise CalibrationError(f"count is from 1 to {len(held)} texts, got {count}; None takes all")
        places = random.Random(ORDER_SEED).sample(range(len(held)), len(held) if count is None else count)
        rows = [{"text": held.texts[i].strip(), "label": held.labels[i]} for i in places]
        return need("datasets", "eval").Dataset.from_list(rows)


def _reviews() -> LabelledTexts:
    from ..data import movie_reviews

    return movie_reviews().test


def _questions() -> LabelledTexts:
    from ..data import trec

    return trec().test


TASKS: Mapping[str, ZeroShotTask] = {
    "movie-reviews": ZeroShotTask(_reviews, "Review: {text}\nSentiment:", ("negative", "positive")),
    "trec": ZeroShotTask(
        _questions,
        "Question: {text}\nThe answer is a",
        ("description", "thing", "abbreviation", "person", "number", "place"),
    ),
}


@dataclass(frozen=True)
class ZeroShot:
    """accuracy: share of right answers; error: its standard error; count: texts; chance: of guessing."""

    accuracy: float
    error: float
    count: int
    chance: float


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | Mapping[str, ZeroShotTask] = tuple(TASKS),
    *,
    count: int | None = None,
    batch: int = 8,
) -> dict[str, ZeroShot]:
    """Ask a causal model without examples, by EleutherAI's lm-eval: argmax_a Σ log p(tokens of a | prompt).

    Args:
        model: a causal model of transformers, dense, pruned or recovered.
        tasks: names out of `TASKS` ("movie-reviews", "trec"), or tasks of your own by name.
        count: texts of each, the same for every model; None = all (2,000 reviews, 500 questions).
        batch: prompts at once.

    Returns:
        By task.

    Raises:
        UnknownName: no such task.
        CalibrationError: count is more than there is.
        MissingDependency: lm-eval is not installed; it comes with the extra "eval".

    Example:
        >>> zero_shot(model, tokenizer, ["trec"], count=100)  # doctest: +SKIP
        {'trec': ZeroShot(accuracy=0.31, error=0.046, count=100, chance=0.1666...)}

    Reference: Gao et al., "A framework for few-shot language model evaluation", lm-eval 0.4.13.
    """
    asked = tasks if isinstance(tasks, Mapping) else {name: _known(name) for name in tasks}
    lm_eval, wrapped = need("lm_eval", "eval"), need("lm_eval.models.huggingface", "eval")
    manager = need("lm_eval.tasks", "eval").TaskManager(include_defaults=False)
    held = lm_eval.simple_evaluate(
        model=wrapped.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=[task.config(name, count) for name, task in asked.items()],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: _score(held["results"][name], held["n-samples"][name], t) for name, t in asked.items()}


def _known(name: str) -> ZeroShotTask:
    if name not in TASKS:
        raise unknown("zero-shot task", name, TASKS)
    return TASKS[name]


def _score(figures: Mapping[str, float], samples: Mapping[str, int], task: ZeroShotTask) -> ZeroShot:
    share, count = float(figures["acc,none"]), int(samples["effective"])
    return ZeroShot(share, (share * (1 - share) / max(count - 1, 1)) ** 0.5, count, 1 / len(task.answers))
