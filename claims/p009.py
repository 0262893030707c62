"""P009, Jaiswal et al., The Emergence of Essential Sparsity, arXiv:2306.03805.

A first version refitted the probe at every density: it held too, with a weaker knee, and took nine minutes. This one
keeps the dense model's probe, which costs less and moves less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import gossamer.methods  # noqa: F401 - fills the registry
from claims.outcome import Outcome
from gossamer.data.language import embed
from gossamer.data.models import load_model, load_tokenizer
from gossamer.data.text import trec
from gossamer.recipes.curve import sparsity_curve
from gossamer.recipes.prune import prune

CLAIM = "One-shot global magnitude pruning of a pretrained encoder is almost free up to a sharp drop, found by rule."
PAPER = "a sharp dropping point exists for every model and task tried, and for N:M too (abstract; no single figure)"
RULE = "a knee is found at 20 % zeros or more, and the error rises at least 3 times faster beyond it than before"


def _probe(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Ridge regression to one-hot labels in closed form: weights [D + 1, classes]."""
    x = functional.pad(x.double(), (0, 1), value=1.0)
    gram = x.T @ x + 1e-2 * len(x) / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ functional.one_hot(y, classes).double())


def _measure(texts: int) -> Callable[[float], float]:
    """Density → held-out error of the dense encoder's own linear probe: nothing is trained after the cut."""
    data, tokenizer, dense = trec(), load_tokenizer("minilm"), load_model("minilm")
    truth, classes = torch.tensor(data.test.labels), len(data.train.names)
    x = embed(dense, tokenizer, data.train.texts[:texts])
    probe = _probe(x, torch.tensor(data.train.labels[:texts]), classes)

    def error(density: float) -> float:
        model = copy.deepcopy(dense)
        if density < 1:
            prune(model, "essential_sparsity", density=density)
        guess = functional.pad(embed(model, tokenizer, data.test.texts).double(), (0, 1), value=1.0) @ probe
        return 1 - float((guess.argmax(1) == truth).double().mean())

    return error


def run(full: bool = False) -> Outcome:
    densities = [1 - i / (20 if full else 10) for i in range(19 if full else 10)]
    curve = sparsity_curve(densities, _measure(5000 if full else 1500))
    ours = {f"error at density {d:.2f}": f"{e:.3f}" for d, e in curve.points}
    ours |= {"knee at density": curve.knee, "rise per 10 % zeros before": f"{curve.before / 10:.4f}"}
    ours |= {"and beyond": f"{curve.beyond / 10:.4f}"}
    holds = curve.knee is not None and curve.knee <= 0.8 and curve.ratio >= 3
    return Outcome(ours, holds, RULE)
