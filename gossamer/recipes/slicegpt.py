"""slice: delete rows and columns of a transformer's weights where its residual stream carries least. It stays dense.

Shape suffixes: N tokens, D the stream's own width, W its width after slicing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attach.calibrate import Arrival, Batch, stream
from ..attach.journal import Journal, data_digest
from ..core.errors import CalibrationError, NonFiniteError, TargetError
from ..core.sparsifier import require_finite
from ..nn.sliced import close_joints, is_sliced, linear_weight, norm_width
from ..nn.streams import Stack, stack_of
from .pruning import Progress
from .slicing import Cut, SliceReport, Turned
from .turns import Site, enter, principal, settle, sites_of


def slice(
    model: nn.Module,
    *,
    keep: float | None = None,
    energy: float | None = None,
    data: Iterable[Batch],
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> SliceReport:
    """Make a transformer narrower, in place: a smaller dense model that runs faster wherever the dense one ran.

    RMSNorm does not notice a rotation of its input, so the residual stream may have another orthogonal basis Q in
    every half of a block: readers become W diag(g) Q, writers Qᵀ W, and a matrix Q_beforeᵀ Q_after joins the residual
    path. With the principal axes of the calibration tokens as Q, the last columns carry least; they are deleted from
    every weight. LayerNorm is RMSNorm of a stream without its mean, which the writers leave out instead.

    Each place sees the signals of the model that is already sliced before it. The last half writes the stream's own
    basis and width again, so that the final norm and the head stay as they are, tied or not. Where a table of
    embeddings is tied to the head, or the model looks at its width, it stays too and one small layer leads from it
    into the first block; otherwise it is cut as well.

    Args:
        model: of transformers, Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma, Phi-3, Starcoder2, OPT, GPT-2, ViT,
            BERT or RoBERTa blocks, whatever its head; `gossamer.save` and `load` know its new shapes.
        keep: fraction of the stream's columns to keep, above 0 and up to 1; 0.75 unless said. The width is rounded down
            to a multiple of 8. At 1 the model is rotated and computes what it did before. The shortcuts cost W² each,
            so that little is won above 0.85.
        energy: instead of one width for all, each place keeps as few columns as hold this fraction of its Σ x², above
            0 and up to 1, rounded up to a multiple of 8. A few huge columns can hold most of it: 0.999 is not much.
        data: calibration batches, as for `prune`; more tokens than the stream has columns.
        workdir: keep the bases found here; a run that was killed goes on with them (its forward passes run again).
        progress: called with (place, done, total).

    Returns:
        A report; the model itself is changed. If an error ends the run, the model is sliced as far as it got, and runs.

    Raises:
        TargetError: the model's blocks cannot be sliced, or hold masks or adapters; the message says what is missing.
        BudgetError: keep or energy lies outside (0, 1], both are given, or fewer than 8 columns would be left.
        CalibrationError: there are no more tokens than columns, or the model fails on them.
        NonFiniteError: a weight or the stream is NaN or infinite; the place is named.

    Example:
        >>> report = slice(model, keep=0.75, data=batches)  # doctest: +SKIP

    Reference: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
        arXiv:2401.15024.

    Departs from the official code: ε is the model's own (there 1e-5); embeddings lose their mean before LayerNorm
    only (there before RMSNorm too, which changes the model); a tied head stays tied (there it is untied, which adds
    a table); no random rotation after the principal axes; the damping of the Gram matrix, which moves no eigenvector,
    is left out.
    """
    began = time.perf_counter()
    if is_sliced(model):
        raise TargetError("the model is sliced already; load the dense one to slice it otherwise")
    stack, batches = stack_of(model), list(data)
    before = _parameters(model), _products(model)
    wide = _width(stack)
    cut = Cut.of(wide, keep, energy)
    _check(model, batches)
    journal = Journal(workdir, _identity(model, stack, cut, batches)) if workdir is not None else None
    run = _Run(model, stack, cut, journal, progress)
    run.go(batches)
    return SliceReport(
        wide,
        max(p.width for p in run.places),
        tuple(run.places),
        before[0],
        _parameters(model),
        before[1],
        _products(model),
        run.tokens,
        time.perf_counter() - began,
    )


def _width(stack: Stack) -> int:
    return norm_width(stack.blocks[0].get_submodule(stack.family.halves[0].norm))


def _check(model: nn.Module, batches: list[Batch]) -> None:
    if not batches:
        raise CalibrationError("slice finds the axes that matter from data; pass data= (calibration batches)")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise TargetError(f"parameter {name!r} is on the meta device and has no values; load the weights first")
        require_finite(p.detach(), f"parameter {name!r}")


def _identity(model: nn.Module, stack: Stack, cut: Cut, batches: list[Batch]) -> dict[str, object]:
    what = {"method": "slicegpt", "model": type(model).__name__, "blocks": len(stack.blocks), **asdict(cut)}
    return {**what, "data": data_digest(batches)}


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _products(model: nn.Module) -> int:
    layers = (m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    return sum(linear_weight(m).numel() for m in layers)


class _Run:
    """One call of `slice`: from place to place along the stream."""

    def __init__(
        self, model: nn.Module, stack: Stack, cut: Cut, journal: Journal | None, progress: Progress | None
    ) -> None:
        self.model, self.stack, self.cut = model, stack, cut
        self.journal, self.progress = journal, progress
        self.tables = stack.tables(model)
        self.places: list[Turned] = []
        self.tokens = 0

    def go(self, batches: list[Batch]) -> None:
        """Stream all batches; whatever happens, no turn is left in the model."""
        sites = sites_of(self.stack)
        by_name = {site.target.name: site for site in sites}
        self.open, self.total = list(sites), len(sites)
        try:
            stream(self.model, batches, [s.target for s in sites], lambda a: self._visit(by_name[a.target.name], a))
        finally:
            for site in self.open:
                settle(site, self.tables)
            if not self.places:
                close_joints(self.stack)

    @torch.no_grad()
    def _visit(self, site: Site, arrival: Arrival) -> None:
        began = time.perf_counter()
        while self.open[0] is not site:
            settle(self.open.pop(0), self.tables)
        values_D, q_DW, resumed = self._basis(site, arrival)
        enter(site, self.stack.family, q_DW)
        width = q_DW.shape[1]
        energy = float(values_D[:width].sum() / values_D.sum().clamp_min(1e-300))
        name = site.target.name.removesuffix(".turn")
        self.places.append(Turned(name, width, energy, time.perf_counter() - began, resumed))
        if self.progress is not None:
            self.progress(name, len(self.places), self.total)

    def _basis(self, site: Site, arrival: Arrival) -> tuple[Tensor, Tensor, bool]:
        name = site.target.name
        self.tokens = sum(x.shape[:-1].numel() if m is None else int(m.sum()) for x, m in _pairs(arrival))
        if self.journal is not None and self.journal.finished(name):
            q_DW = self.journal.read(name, site.stamp)
            return self.journal.mapped(name, kind="spectrum"), q_DW, True
        values_D, axes_DD = principal(self._gram(site, arrival))
        q_DW = axes_DD[:, : self.cut.width_for(values_D)].contiguous()
        if self.journal is not None:
            self.journal.write(name, values_D, kind="spectrum")
            self.journal.write(name, q_DW, of=site.stamp)
        return values_D, q_DW, False

    def _gram(self, site: Site, arrival: Arrival) -> Tensor:
        """Σ x xᵀ over real tokens, in float64."""
        wide = arrival.inputs[0].shape[-1]
        if self.tokens <= wide:
            raise CalibrationError(
                f"{self.tokens} calibration tokens do not tell which of {wide} columns matter; give more than {wide}"
            )
        gram_DD = torch.zeros(wide, wide, dtype=torch.float64, device=arrival.inputs[0].device)
        for x, mask in _pairs(arrival):
            x_ND = site.turn.centre(x.reshape(-1, wide).double())
            x_ND = x_ND if mask is None else x_ND[mask.to(x.device)]
            gram_DD.addmm_(x_ND.t(), x_ND)
        if not bool(gram_DD.isfinite().all()):
            raise NonFiniteError(
                f"the residual stream at {site.target.name!r} is NaN or infinite; check the calibration data, or run "
                "the model in float32"
            )
        return gram_DD


def _pairs(arrival: Arrival) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(arrival.inputs, arrival.masks))
