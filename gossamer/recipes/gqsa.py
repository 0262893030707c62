"""GQSA's training: rounded weights learn block by block, then scales learn end to end with the codes frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..attach.blocks import blocks_of, without_cache
from ..attach.targets import Target, find
from ..core.errors import BudgetError, CalibrationError, TargetError
from ..core.pattern import Pattern
from ..core.pattern import pattern as read
from ..methods.weights.gqsa import GROUPS
from ..methods.weights.gqsa import gqsa as first_stage
from .distillation import logit_kl
from .prune import prune
from .rounding import Learning, OnGrid

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GqsaReport:
    """What `gqsa` did.

    Args:
        density: fraction kept.
        bits: per weight of the layers, scales and lowest values included, places of the kept ones not.
        blocks: per block, the relative output error on its batches at the first and at the last step.
        losses: KL to the dense model at each step of the second stage. Unit: nats.
    """

    density: float
    bits: float
    blocks: dict[str, tuple[float, float]]
    losses: tuple[float, ...]


def gqsa(
    model: nn.Module,
    data: Iterable[Mapping[str, Tensor]],
    *,
    density: float | None = None,
    pattern: str | Pattern = GROUPS,
    bits: int = 4,
    width: int = 128,
    epochs: int = 2,
    lr: float = 3e-4,
    end_epochs: int = 1,
    end_lr: float = 1e-4,
    batch: int = 1,
    seed: int = 0,
    targets: Iterable[str] = (),
    skip: Iterable[str] = (),
    progress: Progress | None = None,
) -> GqsaReport:
    """Cut groups, round to 4 bits and train both away, in place; the result packs into `Int4Groups` to the bit.

    1. The method "gqsa" chooses what is kept, from statistics of `data`.
    2. Block by block (the paper's BQPO), dense weights come back and learn while their rounded values compute:
       minimise ‖block(x; round(w)) − dense block(x)‖², the gradient straight through the rounding. x is what the
       blocks before, finished, hand on.
    3. End to end (E2E-OQP), codes stay and scales and lowest values learn the dense model's answers.

    Args:
        model: a causal language model in float32, or any that returns logits (for stage 3) and has a list of blocks
            (for stage 2). Pack before you convert it: bfloat16 cannot hold what lies on the grid.
        data: batches of equal length without padding, such as {"input_ids": ids}; they run through the model as one
            batch in stage 2, so memory grows with their number.
        density, pattern, bits, width: as for the method.
        epochs, lr: of stage 2, per block; 0 epochs leave it out. Adam, warm-up over a tenth, then linear to 0.
        end_epochs, end_lr: of stage 3.
        batch: texts per step.
        seed: of the order of texts.
        targets, skip: layers, as for `prune`.
        progress: called with (what, done, total).

    Raises:
        CalibrationError: no data, texts of unequal length, or padding among them.
        TargetError: a weight is not in float32, the model has no blocks, or it gives no logits for stage 3.
        BudgetError: epochs, rates or batch out of range.

    Example:
        >>> report = gqsa(model, windows, density=0.5)  # doctest: +SKIP
        >>> layer = PackedLinear.from_linear(model.model.layers[0].mlp.up_proj, "int4groups")  # doctest: +SKIP

    Reference: Zeng et al., GQSA: Group Quantization and Sparsity, arXiv:2412.17560.
    Departs from: no official code and no settings are known; rates are ours. Stage 3 learns the dense model's
        distribution of the next token, not the text's.
    """
    if min(epochs, end_epochs) < 0 or min(lr, end_lr) <= 0 or batch < 1:
        raise BudgetError(f"epochs >= 0, rates > 0 and batch >= 1, got {epochs}, {end_epochs}, {lr}, {end_lr}, {batch}")
    data = list(data)
    whole = _one_batch(data)
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    found = find(model, tuple(targets), tuple(skip)).targets
    if any(t.weight(model).dtype != torch.float32 for t in found):
        raise TargetError("bfloat16 and float16 cannot hold weights on a grid of 4 bits; call model.float() first")
    blocks = blocks_of(model, found)
    if epochs and not blocks:
        raise TargetError("the model has no list of blocks to train one by one; pass epochs=0")
    who = read(pattern)
    with _still(model):
        # Rounding comes after, or kept weights that round to 0 would count as cut.
        unrounded = replace(first_stage(density=density, pattern=who, bits=bits, width=width), solve=None)
        prune(model, unrounded, data=data, targets=targets, skip=skip)
        held = {t.name: _held(model, dense, t, who, bits, width) for t in found}
        order = torch.Generator().manual_seed(seed)
        first, last = Learning(epochs, lr, batch, order), Learning(end_epochs, end_lr, batch, order)
        with without_cache(model), without_cache(dense):
            own = {name: [held[n] for n in inner] for name, inner in blocks.items()} if epochs else {}
            errors = _block_by_block(model, dense, whole, own, first, progress)
            losses = _end_to_end(model, dense, whole, list(held.values()), last)
    grids = [h.grid for h in held.values()]
    entries = sum(g.shape[0] * g.shape[1] for g in grids)
    kept, size = sum(g.count for g in grids), sum(g.nbits for g in grids)
    return GqsaReport(kept / max(entries, 1), size / max(entries, 1), errors, tuple(losses))


def _held(model: nn.Module, dense: nn.Module, target: Target, pattern: Pattern, bits: int, width: int) -> OnGrid:
    """A layer with what was kept, units with anything left, on its grid from now on."""
    w_MK = target.weight(model).detach()
    kept_MK = pattern.merge(pattern.split(w_MK != 0).any(-1), w_MK.shape)
    held = OnGrid(model, target, kept_MK, target.weight(dense).detach(), bits=bits, width=width)
    target.write(model, held.grid.rounded(w_MK))
    return held


def _block_by_block(
    model: nn.Module,
    dense: nn.Module,
    whole: Mapping[str, Tensor],
    own: Mapping[str, list[OnGrid]],
    learning: Learning,
    progress: Progress | None,
) -> dict[str, tuple[float, float]]:
    """One pass over all texts; each block learns when its inputs arrive, and the pass goes on through it as learnt."""
    errors: dict[str, tuple[float, float]] = {}

    def listen(name: str) -> Callable[..., None]:
        def learn(block: nn.Module, args: tuple, kwargs: dict) -> None:
            if name in errors:
                return
            errors[name] = (0.0, 0.0)  # the passes of its own learning go through
            losses = _learn_block(block, dense.get_submodule(name), args, kwargs, own[name], learning)
            errors[name] = (losses[0], losses[-1])
            if progress is not None:
                progress(f"block {name}", len(errors), len(own))

        return learn

    hooks = [model.get_submodule(n).register_forward_pre_hook(listen(n), with_kwargs=True) for n in own]
    try:
        if own:
            with torch.no_grad():
                model(**whole)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def _learn_block(
    block: nn.Module, teacher: nn.Module, args: tuple, kwargs: dict, held: list[OnGrid], learning: Learning
) -> list[float]:
    """The relative error of the block's output at each step."""
    texts = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).shape[0]

    def loss_of(rows: Tensor) -> Tensor:
        x = [_part(v, rows, texts) for v in args], {k: _part(v, rows, texts) for k, v in kwargs.items()}
        with torch.no_grad():
            want = _first(teacher(*x[0], **x[1]))
        return (_first(block(*x[0], **x[1])) - want).square().sum() / want.square().sum().clamp(min=1e-12)

    parameters = [p for h in held for p in h.learn_weights()]
    try:
        with torch.enable_grad():
            return learning.run(parameters, texts, loss_of)
    finally:
        for h in held:
            h.release()


def _end_to_end(
    model: nn.Module, dense: nn.Module, whole: Mapping[str, Tensor], held: list[OnGrid], learning: Learning
) -> list[float]:
    """KL to the dense model's next-token distribution at each step."""
    if not learning.epochs:
        return []
    texts = len(next(iter(whole.values())))

    def loss_of(rows: Tensor) -> Tensor:
        part = {k: v[rows] for k, v in whole.items()}
        with torch.no_grad():
            want = _logits(dense(**part))
        return logit_kl(_logits(model(**part)), want)

    parameters = [p for h in held for p in h.learn_scales()]
    try:
        with torch.enable_grad():
            return learning.run(parameters, texts, loss_of)
    finally:
        for h in held:
            h.release()


def _one_batch(data: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All texts as one batch; what is no tensor (such as use_cache=False) is left out."""
    if not data:
        raise CalibrationError("no calibration batch was given; pass data= as a list of batches")
    names = [k for k, v in data[0].items() if isinstance(v, Tensor)]
    if any(k == "attention_mask" and not bool(d[k].bool().all()) for d in data for k in names):
        raise CalibrationError("texts with padding cannot learn block by block; pass windows of equal length")
    try:
        return {k: torch.cat([d[k] for d in data]) for k in names}
    except (RuntimeError, KeyError) as error:
        raise CalibrationError(f"batches differ in length or in what they hold ({error}); make them alike") from error


def _part(value: object, rows: Tensor, texts: int) -> object:
    """The rows of whatever has one per text."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == texts else value
    if isinstance(value, (tuple, list)):
        return type(value)(_part(v, rows, texts) for v in value)
    return value


def _first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[index]


def _logits(output: object) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TargetError("the model gives no logits to learn end to end; pass end_epochs=0")
    return logits


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Nothing learns but what is asked to, and nothing drops out."""
    learns, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for p, was in learns:
            p.requires_grad_(was)
        for m, was in modes:
            m.training = was
