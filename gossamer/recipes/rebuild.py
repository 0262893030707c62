"""Prune block by block, and reconstruct each block before the next one is looked at.

Two streams of activations run side by side: the dense model's, which says what a block should give, and the pruned
model's, on which it has to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..attach.blocks import blocks_of
from ..attach.blockwise import Call, by_blocks, first_tensor
from ..attach.calibrate import Arrival, Batch, stream
from ..attach.statistics import Collector
from ..attach.targets import Target
from ..core.errors import CalibrationError, TargetError
from ..core.sparsifier import Sparsifier, Stats
from ..score import salt
from .pruning import Run
from .reconstruct import Fitted, Reconstruct, fit


def refuse_reconstruction(sparsifier: Sparsifier, data: Sequence[Batch] | None, offload: bool) -> None:
    """Raise what stands in the way of pruning block by block.

    Raises:
        TargetError: the method looks at all layers together, or weights are to stay on disk.
        CalibrationError: no data.
    """
    if sparsifier.probe or sparsifier.scope == "model":
        raise TargetError(
            f"method {sparsifier.name!r} looks at all layers together, and reconstruction goes block by block; "
            "leave reconstruct= out, or take a method that prunes layer by layer"
        )
    if offload:
        raise TargetError("reconstruction trains a block in memory; leave offload= out")
    if not data:
        raise CalibrationError("reconstruction trains on activations; pass data= (calibration batches)")


class Rebuild:
    """One call of `prune` with reconstruction. Layers outside of blocks are blocks of their own.

    Args:
        run: what becomes of a layer that is finished.
        order: "layer" or "block", within a block: see `prune`'s `sequential`.
    """

    def __init__(self, run: Run, how: Reconstruct, order: str) -> None:
        self.run, self.model, self.how, self.order = run, run.model, how, order
        self.fits: dict[str, Fitted] = {}
        self._unreached: list[str] = []
        by_name = {t.name: t for t in run.targets}
        inside = blocks_of(self.model, run.targets)
        within = {name for inner in inside.values() for name in inner}
        alone = {name: (name,) for name in by_name if name not in within}
        first = {name: i for i, name in enumerate(by_name)}
        everything = sorted((inside | alone).items(), key=lambda item: first[item[1][0]])
        self.blocks = {block: [by_name[n] for n in inner] for block, inner in everything}

    def __call__(self, data: Iterable[Batch]) -> list[str]:
        """All blocks, in order; names of the layers that no batch reached."""
        batches = list(data)
        self._count = len(batches)
        missed = by_blocks(self.model, [*batches, *batches], list(self.blocks), self._answer)
        return [*self._unreached, *(t.name for block in missed for t in self.blocks[block])]

    def _answer(self, block: str, calls: Sequence[Call]) -> list[object]:
        """The second half of the passes carries the dense stream, and is answered while the block is dense."""
        device = next(self.model.parameters()).device
        with self.how.products(device):
            dense = {c.index - self._count: _as(c.run(), c) for c in calls if c.index >= self._count}
        sparse = [c for c in calls if c.index < self._count]
        if not self._resume(block):
            self._rebuild(block, sparse, dense)
        with self.how.products(device):
            return [_as(c.run(), c) if c.index < self._count else dense[c.index - self._count] for c in calls]

    def _rebuild(self, block: str, calls: Sequence[Call], dense: dict[int, object]) -> None:
        began, module = time.perf_counter(), self.model.get_submodule(block)
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        masks = self._prune(block, calls)
        pairs = [(c, first_tensor(dense[c.index])) for c in calls if c.index in dense]
        trained = {n: p for n, p in module.named_parameters() if id(p) in masks or p.ndim < 2}
        if pairs and trained:
            with _trainable(trained.values()) as parameters:
                kept = [masks.get(id(p)) for p in parameters]
                self.fits[block] = fit(parameters, kept, *map(list, zip(*pairs)), self.how)
        new = {n: p.detach().clone() for n, p in trained.items()}
        for n, p in trained.items():
            p.data.copy_(before[n])  # the journal notes which weights a layer was made from
        self._write(block, trained, new, {i for i in masks}, began)

    def _prune(self, block: str, calls: Sequence[Call]) -> dict[int, Tensor]:
        """The block's layers become sparse; supports of the stored weights, by the parameter's id."""
        masks: dict[int, Tensor] = {}
        collect = Collector(needs := self.run.per_layer[self.blocks[block][0].name].needs)
        later: list[tuple[Target, Stats]] = []

        def apply(target: Target, stats: Stats) -> None:
            new, support = self.run.per_layer[target.name].apply(target.weight(self.model).detach(), stats)
            target.write(self.model, new)
            masks[id(target.stored(self.model))] = target.turned(support.kept).contiguous()

        def visit(arrival: Arrival) -> None:
            stats = (
                collect(arrival, arrival.target.module(self.model)) if needs else {"salt": salt(arrival.target.name)}
            )
            apply(arrival.target, stats) if self.order == "layer" else later.append((arrival.target, stats))

        batches = [{**_masks_of(c.batch), "call": c} for c in calls]
        if calls:
            self._unreached += stream(_Through(self.model, self.how), batches, self.blocks[block], visit)
        for target, stats in later:
            apply(target, stats)
        return masks

    def _write(
        self, block: str, trained: dict[str, nn.Parameter], new: dict[str, Tensor], pruned: set[int], began: float
    ) -> None:
        names = {id(p): n for n, p in trained.items()}
        for t in self.blocks[block]:
            if (i := id(t.stored(self.model))) in pruned:
                self.run.finish(t, t.turned(new[names[i]]), began)
        journal, fitted = self.run.journal, self.fits.get(block)
        for n, p in trained.items():
            if id(p) not in pruned:
                if journal is not None:
                    journal.write(f"{block}.{n}", new[n], of=p)
                p.data.copy_(new[n])
        if journal is not None:
            figures = (fitted.before, fitted.after, float(fitted.epoch)) if fitted is not None else ()
            journal.write(block, torch.tensor(figures, dtype=torch.float64), kind="block")

    def _resume(self, block: str) -> bool:
        """A block is finished once its last file is written."""
        journal = self.run.journal
        if journal is None or not journal.finished(block, kind="block"):
            return False
        for t in self.blocks[block]:
            self.run.resume(t)
        for n, p in self.model.get_submodule(block).named_parameters():
            if p.ndim < 2 and journal.finished(f"{block}.{n}"):
                p.data.copy_(journal.read(f"{block}.{n}", p.detach()))
        if figures := journal.mapped(block, kind="block").tolist():
            self.fits[block] = Fitted(figures[0], figures[1], int(figures[2]))
        return True


class _Through(nn.Module):
    """A block's call as a model of its own, where layers keep their names. Solvers, outside, keep their precision."""

    def __init__(self, model: nn.Module, how: Reconstruct) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, call: Call, **_: object) -> object:
        with self.how.products(next(self.model.parameters()).device):
            return call.run()

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)


@contextmanager
def _trainable(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters with gradients, in float32 at least: half types are too coarse for small steps."""
    held = [(p, p.requires_grad, p.data) for p in parameters]
    try:
        for p, _, _ in held:
            p.data = p.data.float() if p.dtype in (torch.bfloat16, torch.float16) else p.data
            p.requires_grad_(True)
        yield [p for p, _, _ in held]
    finally:
        for p, asked, data in held:
            data.copy_(p.data)
            p.data = data
            p.requires_grad_(asked)


def _masks_of(batch: Batch) -> dict[str, object]:
    names = ("attention_mask", "decoder_attention_mask", "decoder_input_ids")
    return {n: batch[n] for n in names if n in batch} if isinstance(batch, dict) else {}


def _as(output: object, call: Call) -> object:
    """Tensors of an output in the type of what came in, which lower precision inside may have changed."""
    dtype = first_tensor((*call.args, *call.kwargs.values())).dtype
    if isinstance(output, Tensor):
        return output.to(dtype) if output.is_floating_point() else output
    return tuple(_as(x, call) for x in output) if type(output) is tuple else output
