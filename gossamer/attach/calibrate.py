"""Calibration: one forward pass per batch, all of them paused together at every layer to be pruned.

Each batch runs in a greenlet. When it reaches a target it stops; once all batches wait there, the layer's input
statistics are taken, the layer is pruned, and the passes go on through the pruned layer. So every layer sees what
it will see when deployed, each batch is run exactly once, only one layer's statistics exist at a time, and nothing
is assumed about how a model hands arguments from block to block: its own forward does that.

By blocks, the passes first run through a whole block, stopping at its layers for statistics only; at its end all its
layers are pruned, and each pass runs the block once more, so that the next one sees what this one now gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ..core.errors import CalibrationError
from .blocks import blocks_of
from .passes import Batch, Pass, advance, start, waiting
from .targets import Target

# Keys and values of cross-attention in transformers' encoder-decoders: T5, BART and OPT-style, BERT.
_CROSS = re.compile(r"(encoder_attn|EncDecAttention|crossattention).*\.(k|v|k_proj|v_proj|key|value)$")


@dataclass(frozen=True)
class Arrival:
    """A layer that all batches (or all that ever will) have reached.

    Args:
        target: the layer.
        inputs: its input in each batch, any leading axes.
        masks: per batch, which tokens are real (None = all).
    """

    target: Target
    inputs: list[Tensor]
    masks: list[Tensor | None]


def stream(
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Sequence[Target],
    visit: Callable[[Arrival], None],
    leave: Callable[[Sequence[Target]], None] | None = None,
    *,
    sequential: str = "layer",
) -> list[str]:
    """Run every batch through the model, calling `visit` at each target before it runs.

    Args:
        model: called as model(**batch) for mappings, model(*batch) for tuples and lists, model(batch) otherwise.
        batches: calibration batches; "attention_mask" tells padding from tokens.
        targets: layers to stop at.
        visit: may change the layer's weight; the passes go on with the new one. A layer that a forward calls more
            than once (shared blocks) is visited at its first call only.
        leave: called with targets just visited, once all statistics are in that are taken before one of them may
            change: after each layer, or by blocks after each block, which runs again afterwards.
        sequential: "layer", or "block": what is seen unchanged while its own statistics are taken. A block is an entry
            of a list of modules (the outermost ones); layers outside of blocks stand for themselves.

    Returns:
        Names of targets that no batch ever reached (such as experts never routed to).

    Raises:
        CalibrationError: no batch was given, or the model's forward fails on one.
    """
    by_name = {t.name: t for t in targets}
    order: dict[str, float] = {t.name: i for i, t in enumerate(targets)}
    blocks = blocks_of(model, targets) if sequential == "block" else {}
    within = {name for inner in blocks.values() for name in inner}
    order |= {block: max(order[name] for name in inner) + 0.5 for block, inner in blocks.items()}
    passes = [start(model, batch) for batch in batches]
    if not passes:
        raise CalibrationError("no calibration batch was given; pass data= as a list of batches")
    by_run = {p.run: p for p in passes}
    hooks = [t.module(model).register_forward_pre_hook(_pause(t.name, by_run), with_kwargs=True) for t in targets]
    hooks += [h for block, inner in blocks.items() for h in _run_twice(model, block, inner, by_run)]
    visited: set[str] = set()
    try:
        with waiting(model, passes):
            for p in passes:
                advance(p, visited)
            while there := [p for p in passes if p.at is not None]:
                # Batches may differ in route (experts); definition order keeps early layers first.
                name = min((p.at for p in there if p.at), key=order.__getitem__)
                here = [p for p in there if p.at == name]
                if name in by_name:
                    visit(Arrival(by_name[name], [p.x for p in here], [real_tokens(p, name) for p in here]))  # type: ignore[misc]
                visited.add(name)
                if leave is not None and name not in within:
                    leave([by_name[n] for n in blocks.get(name, (name,)) if n in visited])
                for p in here:
                    advance(p, visited)
    finally:
        for hook in hooks:
            hook.remove()
    return [t.name for t in targets if t.name not in visited]


def _pause(name: str, by_run: Mapping[greenlet, Pass]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        current = getcurrent()
        mine = by_run.get(current)
        if mine is None or name in mine.done:
            return
        mine.done.add(name)
        x = args[0] if args else next(iter(kwargs.values()))
        current.parent.switch((name, x))

    return hook


def _run_twice(
    model: nn.Module, block: str, inner: Sequence[str], by_run: Mapping[greenlet, Pass]
) -> list[torch.utils.hooks.RemovableHandle]:
    """At a block's end its pass waits until the block has changed, then runs it again with the same arguments."""

    def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if (mine := by_run.get(getcurrent())) is not None and block not in mine.done:
            mine.versions[block] = _versions(args, kwargs)

    def again(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
        current = getcurrent()
        mine = by_run.get(current)
        if mine is None or block in mine.done:
            return None
        _refuse_changed(block, kwargs, mine.versions.pop(block), _versions(args, kwargs))
        mine.done.update(inner, (block,))
        current.parent.switch((block, None))
        return module.forward(*args, **kwargs)

    module = model.get_submodule(block)
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(again, with_kwargs=True),
    ]


def _versions(args: tuple[object, ...], kwargs: dict[str, object]) -> list[int]:
    return [x._version for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _refuse_changed(block: str, kwargs: dict[str, object], before: list[int], after: list[int]) -> None:
    why = "writes into its own inputs" if before != after else None
    if kwargs.get("past_key_values") is not None:
        why = "fills a key-value cache (the batches should not ask for one)"
    if why:
        raise CalibrationError(
            f"block {block!r} {why}, so it cannot be run twice; use sequential='layer', which runs it once"
        )


def real_tokens(p: Pass, name: str) -> Tensor | None:
    """Real tokens of this pass's input, flat, if the batch says which they are and the counts agree."""
    if not isinstance(p.batch, Mapping) or p.x is None:
        return None
    # Cross-attention's keys and values read the encoder's states, whatever the decoder's own mask says.
    decodes = "decoder" in name and "decoder_input_ids" in p.batch and not _CROSS.search(name)
    mask = p.batch.get("decoder_attention_mask" if decodes else "attention_mask")
    flat = isinstance(mask, Tensor) and p.x.ndim == 2 and p.x.shape[0] == mask.numel()
    if not isinstance(mask, Tensor) or not (flat or mask.shape == p.x.shape[:-1]):
        return None
    return mask.reshape(-1).bool()
