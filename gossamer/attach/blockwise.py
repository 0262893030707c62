"""One block at a time: passes stop where a block begins, and whoever drives them says what the block gives.

A block's forward is replaced, for the passes only, by a question. So the driver may run a block on several streams of
activations, change it in between, train it, and answer each pass with what it likes; how a model carries what blocks
give from one to the next stays the model's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from greenlet import getcurrent
from torch import Tensor, nn

from ..core.errors import CalibrationError
from .batches import Batch
from .padding import real_tokens
from .passes import Pass, advance, start, waiting


@dataclass(frozen=True)
class Call:
    """What one pass called a block with.

    Args:
        index: of the pass's batch.
        real: which tokens are real, flat (None = all).
    """

    index: int
    batch: Batch
    block: nn.Module
    args: tuple[object, ...]
    kwargs: dict[str, object]
    real: Tensor | None

    def run(self) -> object:
        """The block's output, as it is now."""
        return self.block(*self.args, **self.kwargs)


Answer = Callable[[str, Sequence[Call]], Sequence[object]]


def by_blocks(model: nn.Module, batches: Iterable[Batch], blocks: Sequence[str], answer: Answer) -> list[str]:
    """Run every batch through the model; `answer` runs the blocks.

    Args:
        model: called as `stream` calls it.
        batches: calibration batches.
        blocks: dotted names, in the order in which they are worked through where batches differ in route.
        answer: (block, the calls of all passes that wait there) → what each call returns to its pass. Asked once per
            block; later calls of a block that is used again run it as it is.

    Returns:
        Names of blocks that no batch ever reached.

    Raises:
        CalibrationError: no batch was given, a block is handed a key-value cache, or the model's forward fails.
    """
    passes = [start(model, batch) for batch in batches]
    if not passes:
        raise CalibrationError("no calibration batch was given; pass data= as a list of batches")
    asked: set[str] = set()
    modules = {name: model.get_submodule(name) for name in blocks}
    own = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = _asking(name, module, passes, asked)
        with waiting(model, passes):
            for p in passes:
                advance(p, asked)
            while len(asked) < len(blocks) and (there := [p for p in passes if p.at is not None]):
                name = min((p.at for p in there if p.at), key=list(blocks).index)
                here = [p for p in there if p.at == name]
                given = answer(name, [p.x for p in here])  # type: ignore[misc]
                asked.add(name)
                for p, output in zip(here, given, strict=True):
                    p.answer = (output,)
                    advance(p, asked)
    finally:
        for name, module in modules.items():
            del module.forward
            if own[name] is not None:
                module.forward = own[name]
    return [name for name in blocks if name not in asked]


def first_tensor(output: object) -> Tensor:
    """What a block hands on: its output, or the first of its outputs."""
    return output if isinstance(output, Tensor) else next(x for x in output if isinstance(x, Tensor))  # type: ignore[attr-defined, return-value]


def _asking(name: str, module: nn.Module, passes: Sequence[Pass], asked: set[str]) -> Callable[..., object]:
    forward = module.forward
    index_of = {p.run: i for i, p in enumerate(passes)}

    def ask(*args: object, **kwargs: object) -> object:
        current = getcurrent()
        if current not in index_of or name in asked:
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:
            raise CalibrationError(
                f"block {name!r} fills a key-value cache, so it cannot be run more than once; pass batches with "
                "use_cache=False"
            )
        p = passes[index_of[current]]
        p.x = first_tensor((*args, *kwargs.values()))
        call = Call(index_of[current], p.batch, module, args, kwargs, real_tokens(p, name))
        return current.parent.switch((name, call))

    return ask
