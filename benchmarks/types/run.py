"""What number types cost MiniLM: errors of pruned layers on their real activations, in float32, bfloat16, int8, int4.

python -m benchmarks.types.run [--quick]

The error of a layer is |y - exact| / |exact| over all its outputs, where exact is the float64 product of the same
pruned weights and float32 activations: what pruning costs is not in it. Kept are 20 % in groups of four rows by |w|,
for int4 half of the groups of sixteen columns. The cosine compares sentence embeddings with those of the pruned float32
model.

Shapes: T tokens, M output rows, K input columns.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.results import table, write_results
from gossamer.data import embed, load_model, load_tokenizer
from gossamer.demos.minilm import _sentences
from gossamer.formats import Int4Groups, RowGrouped
from gossamer.kernels import resolve
from gossamer.kernels.cpu.narrow import narrow
from gossamer.kernels.cpu.spmm_panels import spmm_panels
from gossamer.kernels.cpu.tokens import panels_to_rows, rows_to_panels
from gossamer.kernels.lowering import lower
from gossamer.recipes.prune import prune

DENSITY, BLOCK = 0.2, 256
HEADS = ["type", "query, key, value", "attention output", "intermediate", "output", "cosine of embeddings"]
KINDS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
Product = Callable[[Tensor], Tensor]


def on_panels(weights, dtype: torch.dtype) -> Product:
    """A product of float32 rows [T, K] through panels of `dtype`."""

    def product(x_TK: Tensor) -> Tensor:
        x = rows_to_panels(x_TK).to(dtype)
        y = torch.empty(x.shape[0], weights.rows, x.shape[2])
        return panels_to_rows(spmm_panels(weights, x, out=y), 1, x_TK.shape[0])

    return product


def by_fours(w_MK: Tensor) -> Product:
    """The product of 4-bit groups; bfloat16 in and out."""
    plan = resolve(Int4Groups.from_dense(w_MK.bfloat16()), backend="cpu")
    return lambda x_TK: torch.cat([plan.run(x.bfloat16().contiguous()).float() for x in x_TK.split(BLOCK)])


def product_in(name: str, w_MK: Tensor) -> Product:
    """The product of a pruned weight in one type."""
    if name == "int4":
        return by_fours(w_MK)
    if name == "bfloat16":
        return on_panels(narrow(RowGrouped.from_dense(w_MK.bfloat16(), w_MK != 0, g=4)), torch.bfloat16)
    stored = RowGrouped.from_dense(w_MK, w_MK != 0, g=4)
    return on_panels(lower(stored) if name == "float32" else narrow(stored, torch.int8), torch.float32)


TYPES = ("float32", "bfloat16", "int8", "int4")


class Typed(nn.Module):
    """A linear layer in another type, which sums up how far it is from the exact product."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.linear, self.product, self.wrong, self.size = linear, product_in(name, linear.weight.detach()), 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1]).contiguous()
        y_TM = self.product(x_TK)
        exact_TM = x_TK.double() @ self.linear.weight.double().t()
        self.wrong += float((y_TM - exact_TM).square().sum())
        self.size += float(exact_TM.square().sum())
        return (y_TM + self.linear.bias).view(*x.shape[:-1], -1)


def kind_of(name: str) -> str | None:
    """Which column a layer belongs to."""
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def measured(pruned: nn.Module, tokenizer, texts: list[str], name: str) -> dict[str, float]:
    """Errors by kind of layer, and the cosine, with all layers of the encoder in one type."""
    want, model, sums = embed(pruned, tokenizer, texts), copy.deepcopy(pruned), defaultdict(lambda: [0.0, 0.0])
    layers = {at: m for at, m in model.named_modules() if isinstance(m, nn.Linear) and kind_of(at)}
    typed = {at: Typed(linear, name) for at, linear in layers.items()}
    for at, layer in typed.items():
        model.set_submodule(at, layer)
    cosine = float((embed(model, tokenizer, texts) * want).sum(1).mean())
    for at, layer in typed.items():
        column = HEADS[1] if kind_of(at) in KINDS[:3] else HEADS[KINDS.index(kind_of(at)) - 1]
        sums[column][0] += layer.wrong
        sums[column][1] += layer.size
    return {column: (wrong / size) ** 0.5 for column, (wrong, size) in sums.items()} | {HEADS[-1]: cosine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sentences; writes no results")
    options = parser.parse_args()
    dense, tokenizer = load_model("minilm"), load_tokenizer("minilm")
    texts = _sentences(4000)[: 8 if options.quick else 128]
    lines = {}
    for name in TYPES:
        pattern, density = ("o ([g] {16})", 0.5) if name == "int4" else ("4-row", DENSITY)
        pruned = copy.deepcopy(dense)
        prune(pruned, "magnitude", density=density, pattern=pattern)
        with torch.inference_mode():
            lines[name] = measured(pruned, tokenizer, texts, name)
        print(name, lines[name], flush=True)
    rows = [[name, *(f"{line[h]:.1e}" for h in HEADS[1:-1]), f"{line[HEADS[-1]]:.5f}"] for name, line in lines.items()]
    if not options.quick:
        notes = [
            f"{len(texts)} sentences; kept: {DENSITY:.0%} in groups of four rows, for int4 half of the groups of 16."
        ]
        page = write_results("types", {"lines": lines}, HEADS, rows, notes)
        print(table(HEADS, rows), *notes, f"written to {page}", sep="\n")


if __name__ == "__main__":
    main()
