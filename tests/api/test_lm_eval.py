"""Zero-shot scores through lm-eval are those of log-probabilities summed by hand."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.errors import CalibrationError, MissingDependency, UnknownName
from gossamer.data.text import LabelledTexts
from gossamer.integrations.lm_eval import TASKS, ZeroShotTask, zero_shot

transformers = pytest.importorskip("transformers")
TOKENS = ("good", "bad", "very", "dull", "bright", "film", "plot", "Review", "Sentiment", ":", "negative", "positive")
WORDS = ["[PAD]", "[UNK]", *TOKENS]
TEXTS = [f"{a} {b} {c}" for a in ("good", "bad", "very") for b in ("dull", "bright") for c in ("film", "plot")]
LABELS = [i % 2 for i in range(12)]
TASK = ZeroShotTask(
    lambda: LabelledTexts(tuple(TEXTS), tuple(LABELS), ("n", "p")),
    "Review : {text} Sentiment :",
    ("very negative", "positive film"),
)


def pair():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[PAD]")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():  # default weights are so small that answers hardly depend on the text
        p.data.mul_(30.0 if p.ndim > 1 else 1.0)
    return model, tokenizer


def by_hand(model, tokenizer, text: str) -> int:
    prompt = tokenizer(f"Review : {text} Sentiment :").input_ids
    sums = []
    for answer in TASK.answers:
        ids = tokenizer(answer).input_ids
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        sums.append(sum(float(log_p[len(prompt) + i - 1, t]) for i, t in enumerate(ids)))
    return max(range(2), key=sums.__getitem__)


def test_scores_are_summed_log_probabilities() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    model, tokenizer = pair()
    answers = [by_hand(model, tokenizer, text) for text in TEXTS]
    assert 0 < sum(answers) < 12  # the model does not always say the same
    got = zero_shot(model, tokenizer, {"own": TASK})["own"]
    want = sum(a == b for a, b in zip(answers, LABELS)) / 12
    assert got.accuracy == pytest.approx(want) and got.count == 12 and got.chance == 0.5
    assert got.error == pytest.approx((want * (1 - want) / 11) ** 0.5)
    some = zero_shot(model, tokenizer, {"own": TASK}, count=5)["own"]
    assert some.count == 5 and some == zero_shot(model, tokenizer, {"own": TASK}, count=5, batch=2)["own"]
    with pytest.raises(CalibrationError, match="from 1 to 12"):
        zero_shot(model, tokenizer, {"own": TASK}, count=13)


def test_an_unknown_task_and_a_missing_library_are_told_of(monkeypatch) -> None:
    with pytest.raises(UnknownName, match="'trec'"):
        zero_shot(None, None, ["trek"])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match=r"gossamer\[eval\]"):
        zero_shot(None, None, ["trec"])


@pytest.mark.assets
def test_packaged_tasks_have_an_answer_for_each_label() -> None:
    for name, count in (("movie-reviews", 2000), ("trec", 500)):
        held = TASKS[name].texts()
        assert len(held) == count and set(held.labels) == set(range(len(TASKS[name].answers)))
        assert "{text}" in TASKS[name].prompt
