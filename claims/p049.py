"""P049, Ashkboos et al., SliceGPT, arXiv:2401.15024."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor, nn

from claims.outcome import Outcome

CLAIM = (
    "25 % of the rows and columns deleted: computational invariance is exact before slicing, and the model that is "
    "left is dense, smaller and faster."
)
PAPER = (
    "up to 25 % of the parameters removed; LLAMA-2 70B, OPT 66B and Phi-2 keep 99, 99 and 90 % of their zero-shot "
    "performance (abstract)"
)
RULE = (
    "SmolLM2-135M on WikiText-2: rotated and not sliced, its logits differ by at most 1e-4 of the largest; with 75 % "
    "of the width it has fewer parameters than before, and a prompt of 128 and one of 512 tokens take less time than "
    "with torch's dense model (medians of runs in turn). Perplexity is told for three draws of calibration windows and "
    "decides nothing: the weights were quantised to 4 bits once, and the paper's models are 20 to 500 times as large"
)
KEEP = 0.75


@dataclass(frozen=True)
class Effort:
    """Windows of calibration text, how often they are drawn, and windows of test text, of 1024 tokens."""

    windows: int
    length: int
    draws: int
    test: int


def _calibration(effort: Effort, seed: int) -> list[dict[str, Tensor]]:
    from gossamer.data import load_tokenizer, token_windows, wikitext2

    tokenizer = load_tokenizer("smollm2-135m")
    ids_WT = token_windows(
        tokenizer, wikitext2("train")[:300_000], length=effort.length, count=effort.windows, seed=seed
    )
    return [{"input_ids": part} for part in ids_WT.split(2)]


@torch.no_grad()
def _rotated(dense: nn.Module, test_WT: Tensor, effort: Effort) -> float:
    """Largest difference of the logits after rotating, as a fraction of the largest of them."""
    import gossamer

    model, ids = copy.deepcopy(dense), test_WT[:1, :256]
    before = model(input_ids=ids).logits
    gossamer.slice(model, keep=1.0, data=_calibration(Effort(2, effort.length, 1, 1), seed=0))
    return float((model(input_ids=ids).logits - before).abs().max() / before.abs().max())


@torch.no_grad()
def _times(models: Sequence[nn.Module], tokens: int, rounds: int = 5) -> list[float]:
    """Median milliseconds of one prompt, the models taking turns."""
    from gossamer.deploy.timing import in_turn

    ids = torch.arange(tokens)[None] + 1000
    ways = {str(i): partial(model, input_ids=ids) for i, model in enumerate(models)}
    return [median(taken) for taken in in_turn(ways, rounds).values()]


def run(full: bool = False) -> Outcome:
    import gossamer
    from gossamer.data import load_model, load_tokenizer, perplexity, token_windows, wikitext2

    effort = Effort(32, 1024, 3, 16) if full else Effort(5, 512, 3, 1)
    tokenizer = load_tokenizer("smollm2-135m")
    test_WT = token_windows(tokenizer, wikitext2("test"), length=1024, count=effort.test)
    dense, losses, reports = load_model("smollm2-135m"), [], []
    difference = _rotated(dense, test_WT, effort)
    for seed in range(effort.draws):
        model = copy.deepcopy(dense)
        reports.append(gossamer.slice(model, keep=KEEP, data=_calibration(effort, seed)))
        losses.append(perplexity(model, test_WT))
    times = {tokens: _times((dense, model), tokens) for tokens in (128, 512)}
    report = reports[0]
    ours = {
        "largest difference of the logits, rotated and not sliced": f"{difference:.1e} of the largest",
        "width": f"{report.width_before} to {report.width}",
        "parameters, tied ones once": f"{report.parameters_before / 1e6:.1f} to {report.parameters / 1e6:.1f} million",
        "multiplications per token": f"{report.products_before / 1e6:.1f} to {report.products / 1e6:.1f} million",
        "perplexity, dense": round(perplexity(dense, test_WT), 2),
        "perplexity, sliced, per draw": ", ".join(f"{p:.2f}" for p in losses),
        "perplexity, sliced, mean": round(mean(losses), 2),
        "seconds of slicing": ", ".join(f"{r.seconds:.0f}" for r in reports),
    }
    for tokens, (before, after) in times.items():
        ours[f"ms per prompt of {tokens} tokens"] = f"{before:.0f} to {after:.0f}, {before / after:.2f} times as fast"
    fewer = all(r.parameters < r.parameters_before for r in reports)
    quicker = all(after < before for before, after in times.values())
    return Outcome(ours, difference <= 1e-4 and fewer and quicker, RULE)
