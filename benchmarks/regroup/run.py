"""What row groups cost MiniLM, in order and regrouped, at matched density: Wanda, without and with a short recovery.

python -m benchmarks.regroup.run [--quick] [--reviews 2500] [--steps 60]
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict, dataclass

from torch import nn

from benchmarks.results import table, write_results
from gossamer.data import embed, encode_batches, load_model, load_tokenizer
from gossamer.demos.minilm import RECOVER_LR, _sentences, _shuffled_batches, _Task
from gossamer.recipes.prune import prune
from gossamer.recipes.recover import recover

# (pattern, regrouped): the same number of weights of each row, or of each group of rows.
WAYS = (("row", False), *((f"{g}-row", regrouped) for g in (4, 2, 8) for regrouped in (False, True)))
HEADS = ["zeros", "pattern", "rows", "cosine to dense", "recovered", "probe accuracy, recovered", "prune s"]


@dataclass(frozen=True)
class Line:
    """One way of pruning.

    Args:
        cosine: mean cosine of held-out sentence embeddings with the dense model's, after the cut.
        recovered: the same after recovery.
        accuracy: of the probe, after recovery.
        seconds: of pruning.
    """

    zeros: float
    pattern: str
    regrouped: bool
    cosine: float
    recovered: float | None
    accuracy: float | None
    seconds: float


class Bench:
    """The model, its texts, and what is measured on them."""

    def __init__(self, reviews: int, steps: int) -> None:
        self.dense, self.tokenizer = load_model("minilm"), load_tokenizer("minilm")
        sentences = _sentences(4000)
        self.calibration = encode_batches(self.tokenizer, sentences[:256], batch_size=64)
        self.held, self.steps = sentences[256:656], steps
        self.batches = _shuffled_batches(self.tokenizer, sentences[656:], 32)
        self.want = embed(self.dense, self.tokenizer, self.held)
        self.task = _Task(self.tokenizer, reviews) if reviews else None

    def cosine(self, model: nn.Module) -> float:
        return float((embed(model, self.tokenizer, self.held) * self.want).sum(1).mean())

    def accuracy(self, model: nn.Module) -> float | None:
        return self.task and self.task.accuracy(self.task.answers(model))

    def line(self, zeros: float, pattern: str, regrouped: bool) -> Line:
        model, began = copy.deepcopy(self.dense), time.perf_counter()
        prune(model, "wanda", sparsity=zeros, pattern=pattern, regroup=regrouped, data=self.calibration)
        seconds, cut = time.perf_counter() - began, self.cosine(model)
        if not self.steps:
            return Line(zeros, pattern, regrouped, cut, None, None, seconds)
        recover(model, self.dense, self.batches, steps=self.steps, lr=RECOVER_LR)
        return Line(zeros, pattern, regrouped, cut, self.cosine(model), self.accuracy(model), seconds)


def _row(r: Line) -> list[str]:
    shown = lambda x, digits: "–" if x is None else f"{x:.{digits}f}"
    how = "regrouped" if r.regrouped else "in order"
    figures = [shown(r.cosine, 4), shown(r.recovered, 4), shown(r.accuracy, 4), shown(r.seconds, 0)]
    return [f"{r.zeros:.0%}", r.pattern, how, *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one density, no recovery; writes no results")
    parser.add_argument("--reviews", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.8, 0.9])
    options = parser.parse_args()
    bench = Bench(0, 0) if options.quick else Bench(options.reviews, options.steps)
    lines = []
    for zeros in options.zeros[: 1 if options.quick else None]:
        for pattern, regrouped in WAYS:
            lines.append(bench.line(zeros, pattern, regrouped))
            print(*_row(lines[-1]), sep=" | ", flush=True)
    if not options.quick:
        notes = [f"Recovery: {options.steps} steps. Probe: {options.reviews} Rotten Tomatoes reviews, five folds."]
        page = write_results("regroup", {"lines": [asdict(r) for r in lines]}, HEADS, [*map(_row, lines)], notes)
        print(table(HEADS, [*map(_row, lines)]), *notes, f"written to {page}", sep="\n")


if __name__ == "__main__":
    main()
