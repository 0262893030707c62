"""Calibration: one forward pass per batch, all of them paused together at every layer to be pruned.

Each batch runs in a greenlet. When it reaches a target it stops; once all batches wait there, the layer's input
statistics are taken, the layer is pruned, and the passes go on through the pruned layer. So every layer sees what
it will see when deployed, each batch is run exactly once, only one layer's statistics exist at a time, and nothing
is assumed about how a model hands arguments from block to block: its own forward does that.

By blocks, the passes first run through a whole block, stopping at its layers for statistics only; at its end all its
layers are pruned, and each pass runs the block once more, so that the next one sees what this one now gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import CalibrationError
from ..core.ranks import ProcessGroup, least_over_ranks
from .batches import Batch, check_tokens
from .blocks import blocks_of
from .padding import real_tokens
from .passes import Pass, advance, start, waiting
from .shelf import shelf_of
from .spool import Spool
from .targets import Target


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
    spool: Spool | None = None,
    group: ProcessGroup | None = None,
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
        spool: where activations wait on disk; None = they stay in memory.
        group: processes that calibrate the same model together, each with its own batches: they visit the same layers
            in the same order, with no inputs where none of their own batches came.

    Returns:
        Names of targets that no batch ever reached (such as experts never routed to).

    Raises:
        CalibrationError: no batch was given, or the model's forward fails on one.
    """
    by_name = {t.name: t for t in targets}
    order: dict[str, tuple[float, ...]] = {t.name: (i,) for i, t in enumerate(targets)}
    blocks = blocks_of(model, targets) if sequential == "block" else {}
    within = {name for inner in blocks.values() for name in inner}
    starts = _starts(model, targets)
    order |= {block: (*max(order[name] for name in inner), 0.0) for block, inner in blocks.items()} | starts
    passes = [start(model, batch) for batch in batches]
    check_tokens(model, [p.batch for p in passes])
    if not passes:
        raise CalibrationError("no calibration batch was given; pass data= as a list of batches")
    by_run = {p.run: p for p in passes}
    hooks = [t.module(model).register_forward_pre_hook(_pause(t.name, by_run), with_kwargs=True) for t in targets]
    hooks += [
        model.get_submodule(name[:-1]).register_forward_pre_hook(_pause(name, by_run), with_kwargs=True, prepend=True)
        for name in starts
    ]
    hooks += [h for block, inner in blocks.items() for h in _run_twice(model, block, inner, by_run)]
    visited: set[str] = set()
    with waiting(model, passes, spool, hooks):
        for p in passes:
            advance(p, visited, spool)
        # What comes after the last target, such as a large head, tells nothing.
        while not visited.issuperset((*by_name, *blocks)):
            # Batches may differ in route (experts); definition order keeps early layers first.
            name = _next({p.at for p in passes if p.at is not None}, order, group)
            if name is None:
                break
            here = [p for p in passes if p.at == name]
            if name in by_name:
                masks = [real_tokens(p, name) for p in here]
                visit(Arrival(by_name[name], [p.x for p in here], masks))  # type: ignore[misc]
            visited.add(name)
            if leave is not None and name not in within:
                with spool.still() if spool else nullcontext():
                    leave([by_name[n] for n in blocks.get(name, (name,)) if n in visited and n in by_name])
            for p in here:
                advance(p, visited, spool)
    return [t.name for t in targets if t.name not in visited]


def _next(places: set[str], order: Mapping[str, tuple[float, ...]], group: ProcessGroup | None) -> str | None:
    """The first place where a pass waits, of this process or of any in the group; None when all are through."""
    if group is None:
        return min(places, key=order.__getitem__, default=None)
    names = sorted(order, key=order.__getitem__)
    first = least_over_ranks(min((names.index(n) for n in places), default=len(names)), group)
    return names[first] if first < len(names) else None


def _starts(model: nn.Module, targets: Sequence[Target]) -> dict[str, tuple[float, ...]]:
    """Where passes gather before a block is loaded, none left in the one before; and its place among targets.

    Empty for a model that is in memory.
    """
    shelf = shelf_of(model)
    at = {name: i for i, (name, _) in enumerate(model.named_modules())}
    before = lambda block: sum(at[t.layer] < at[block] for t in targets)
    return {f"{b}:": (before(b) - 1, 1.0, at[b]) for b in (shelf.blocks if shelf else ())}


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
) -> list[RemovableHandle]:
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
