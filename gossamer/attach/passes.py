"""Passes: forward passes of one model, one per batch, that stop where they are asked to and wait for each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import CalibrationError, GossamerError
from .batches import Batch, call, describe
from .blocks import without_cache
from .spool import Spool


class Modes:
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
class Pass:
    """One batch on its way through the model.

    Args:
        at: where it waits.
        x: what it brought there.
        answer: what it is given when it goes on.
    """

    batch: Batch
    run: greenlet
    at: str | None = None
    x: Tensor | None = None
    answer: tuple[object, ...] = ()
    modes: Modes | None = None
    done: set[str] = field(default_factory=set)
    versions: dict[str, list[int]] = field(default_factory=dict)


def start(model: nn.Module, batch: Batch) -> Pass:
    """A pass that has not begun."""
    return Pass(batch, greenlet(partial(call, model, batch)))


def advance(p: Pass, visited: set[str], spool: Spool | None = None) -> None:
    """Let one pass run on to the next layer nobody has pruned yet, or to its end."""
    while True:
        p.at, p.x = None, None
        outer = Modes()
        (p.modes or outer).set()
        try:
            with spool.passing() if spool else nullcontext():
                stop = p.run.switch(*p.answer)
            _refuse_inference_mode(p)
        except GossamerError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            raise CalibrationError(
                f"the model's forward failed on a calibration batch ({describe(p.batch)}): "
                f"{type(error).__name__}: {error}; check that model(**batch) runs by itself"
            ) from error
        finally:
            p.modes = Modes()
            outer.set()
        if p.run.dead:
            return
        p.at, p.x = stop
        if p.at not in visited:
            return


def _refuse_inference_mode(p: Pass) -> None:
    if torch.is_inference_mode_enabled():
        p.run.throw(GreenletExit)  # leaves the mode on its way out
        raise CalibrationError(
            "the model's forward (or its caller) runs under inference_mode, whose tensors cannot be written later; "
            "use torch.no_grad there"
        )


@contextmanager
def waiting(
    model: nn.Module, passes: Sequence[Pass], spool: Spool | None = None, hooks: Sequence[RemovableHandle] = ()
) -> Iterator[None]:
    """The model as passes want it: in evaluation, without gradients or caches. Those still under way end with it.

    Args:
        spool: where what they leave behind may wait on disk.
        hooks: removed at the end.
    """
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), without_cache(model), spool or nullcontext():
            try:
                yield
            finally:
                _end(passes)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode


def _end(passes: Sequence[Pass]) -> None:
    outer = Modes()
    for p in passes:
        p.x = None
        if not p.run.dead:
            p.run.throw(GreenletExit)
    outer.set()
