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
from dataclasses import dataclass, field

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from ..core.errors import CalibrationError
from .blocks import blocks_of, without_cache
from .targets import Target

# Keys and values of cross-attention in transformers' encoder-decoders: T5, BART and OPT-style, BERT.
_CROSS = re.compile(r"(encoder_attn|EncDecAttention|crossattention).*\.(k|v|k_proj|v_proj|key|value)$")
Batch = Mapping[str, object] | Sequence[object] | Tensor


class _Modes:
    """torch's thread-local modes. Passes share a thread, so each must find its own again when it goes on."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]

    def set(self) -> None:
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


@dataclass(eq=False)
class _Pass:
    """One batch on its way through the model."""

    batch: Batch
    run: greenlet
    at: str | None = None
    x: Tensor | None = None
    modes: _Modes | None = None
    done: set[str] = field(default_factory=set)
    versions: dict[str, list[int]] = field(default_factory=dict)


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
    passes = [_start(model, batch) for batch in batches]
    if not passes:
        raise CalibrationError("no calibration batch was given; pass data= as a list of batches")
    by_run = {p.run: p for p in passes}
    hooks = [t.module(model).register_forward_pre_hook(_pause(t.name, by_run), with_kwargs=True) for t in targets]
    hooks += [h for block, inner in blocks.items() for h in _run_twice(model, block, inner, by_run)]
    visited: set[str] = set()
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), without_cache(model):
            for p in passes:
                _advance(p, visited)
            while waiting := [p for p in passes if p.at is not None]:
                # Batches may differ in route (experts); definition order keeps early layers first.
                name = min((p.at for p in waiting if p.at), key=order.__getitem__)
                here = [p for p in waiting if p.at == name]
                if name in by_name:
                    visit(Arrival(by_name[name], [p.x for p in here], [_mask(p, name) for p in here]))  # type: ignore[misc]
                visited.add(name)
                if leave is not None and name not in within:
                    leave([by_name[n] for n in blocks.get(name, (name,)) if n in visited])
                for p in here:
                    _advance(p, visited)
    finally:
        for hook in hooks:
            hook.remove()
        outer = _Modes()
        for p in passes:
            if not p.run.dead:
                p.run.throw(GreenletExit)
        outer.set()
        for module, mode in training:
            module.training = mode
    return [t.name for t in targets if t.name not in visited]


def _start(model: nn.Module, batch: Batch) -> _Pass:
    def forward() -> None:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)):
            model(*batch)
        else:
            model(batch)

    return _Pass(batch, greenlet(forward))


def _pause(name: str, by_run: Mapping[greenlet, _Pass]) -> Callable[..., None]:
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
    model: nn.Module, block: str, inner: Sequence[str], by_run: Mapping[greenlet, _Pass]
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


def _advance(p: _Pass, visited: set[str]) -> None:
    """Let one pass run on to the next layer nobody has pruned yet, or to its end."""
    while True:
        p.at, p.x = None, None
        outer = _Modes()
        (p.modes or outer).set()
        try:
            stop = p.run.switch()
            _refuse_inference_mode(p)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(
                f"the model's forward failed on a calibration batch ({_describe(p.batch)}): "
                f"{type(error).__name__}: {error}; check that model(**batch) runs by itself"
            ) from error
        finally:
            p.modes = _Modes()
            outer.set()
        if p.run.dead:
            return
        p.at, p.x = stop
        if p.at not in visited:
            return


def _refuse_inference_mode(p: _Pass) -> None:
    if torch.is_inference_mode_enabled():
        p.run.throw(GreenletExit)  # leaves the mode on its way out
        raise CalibrationError(
            "the model's forward (or its caller) runs under inference_mode, whose tensors cannot be written later; "
            "use torch.no_grad there"
        )


def _describe(batch: Batch) -> str:
    if isinstance(batch, Mapping):
        return ", ".join(
            f"{k} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in batch.items()
        )
    return str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__


def _mask(p: _Pass, name: str) -> Tensor | None:
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
