"""Dense products among panels: rows out, oneDNN's product, rows in, where that beats multiplying in panels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..formats import Dense
from ..kernels.cpu.elementwise import plan_elementwise
from ..kernels.cpu.memory import floats
from ..kernels.cpu.tokens import plan_panels_to_rows, plan_rows_to_panels
from ..kernels.dense import FUSED, onednn_refusal
from ..kernels.dispatch import Plan, resolve
from .layouts import Tokens
from .operators import Product

if TYPE_CHECKING:
    from .memory import Buffer
    from .recorder import Recorder, Value
    from .weights import Weights

NAME = "dense/onednn"
# Below this, sparse forms win by far and the dense one need not be laid out to know it.
WORTH_TRYING = 0.3


class DenseProduct:
    """act(W x + b) of rows, on oneDNN, for one number of positions."""

    def __init__(self, op: Product, weights: Weights, positions: int, activation: str) -> None:
        self.plan: Plan = resolve(Dense.from_dense(weights.w_MK), tokens=positions, backend="onednn")
        self.bias, self.activation = op.bias, activation

    @property
    def nbytes(self) -> int:
        """Of the weight as oneDNN re-ordered it for this number of positions."""
        return self.plan.extra_nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.plan.run(x.flatten(0, -2), self.bias, self.activation)
        return y.view(*x.shape[:-1], y.shape[-1])


def worth_trying(op: Product, weights: Weights, layout: object) -> bool:
    """Whether oneDNN's product is to be measured here."""
    if not isinstance(layout, Tokens) or weights.density < WORTH_TRYING or op.activation not in FUSED:
        return False
    return onednn_refusal(torch.float32) is None


def way(op: Product, weights: Weights, layout: Tokens, x: Buffer, y: Buffer, threads: int) -> Callable[[], None]:
    """The whole detour, to be timed."""
    product, out = DenseProduct(op, weights, layout.sequences * layout.positions, op.activation), y.address
    there = plan_panels_to_rows(layout.sequences, layout.positions, layout.features, threads=threads)
    features = weights.w_MK.shape[0]
    back = plan_rows_to_panels(layout.sequences, layout.positions, features, threads=threads)

    def run() -> None:
        rows = floats(*layout.shape)
        there.run(x.address, rows.data_ptr())
        done = product(rows)  # named, for it must outlive the call that reads its address
        back.run(done.data_ptr(), out)

    return run


def record(
    rec: Recorder, op: Product, weights: Weights, source: Value, layout: Tokens, y: Buffer, residual: Buffer | None
) -> None:
    """Add the detour to a plan; a sum with a residual follows in panels."""
    first = op.activation if residual is None else "none"
    product = DenseProduct(op, weights, layout.sequences * layout.positions, first)
    rec.tensor(source)
    rows = rec.function(op.name, NAME, product, source)
    out = layout.with_features(weights.w_MK.shape[0])
    back = plan_rows_to_panels(out.sequences, out.positions, out.features, threads=rec.threads)
    rec.launch(op.name, "to panels", back, rows.slot, y)  # type: ignore[arg-type]
    if residual is not None:
        add = plan_elementwise(
            out.panels, out.features, width=out.width, form="add", activation=op.activation, threads=rec.threads
        )
        rec.launch(op.name, "add", add, y, residual, y)
