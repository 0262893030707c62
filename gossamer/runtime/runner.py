"""Runner: a saved model run as a whole network, in the process that is timed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import GossamerError
from ..deploy.examples import tensors
from ..deploy.load import load
from .compiled import Compiled, compile


def whole_network(model: str | Path, threads: int) -> Callable[[dict], Callable[[], list]]:
    """A model that `gossamer.save` wrote, compiled on the first inputs it is bound to and on those it cannot serve."""
    torch.set_num_threads(threads)
    plain = load(model, verify=False)
    made: list[Compiled] = []

    def bind(arrays: dict) -> Callable[[], list]:
        inputs = {name: torch.from_numpy(a) for name, a in arrays.items()}
        numbered = all(name.startswith("input_") and name[6:].isdigit() for name in inputs)
        example: dict[str, Tensor] | tuple[Tensor, ...] = tuple(inputs.values()) if numbered else inputs
        fast = _serving(made, plain, example)
        args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)

        def run() -> list:
            return [t.numpy() for t in tensors(fast(*args, **kwargs))]

        return run

    return bind


def _serving(made: list[Compiled], plain: torch.nn.Module, example) -> Compiled:
    """One of those already compiled where it serves the example, else a new one."""
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), example)
    for fast in made:
        try:
            fast(*args, **kwargs)
        except GossamerError:
            continue
        return fast
    made.append(compile(plain, example, remeasure=True))
    return made[-1]
