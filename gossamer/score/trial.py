"""Trial: data and a loss, on which a model is tried out before it is pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.core.errors import CalibrationError

Loss = Callable[[Any, Any], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """What a probe may ask a model.

    Args:
        batches: each (inputs, target), where inputs are a tensor, a tuple (passed as arguments) or a mapping (passed
            by name); or one mapping with all of it.
        loss: (output, target) → scalar; a mapping is its own target. None: the model returns its loss, as those of
            transformers do when a batch holds "labels".
    """

    batches: tuple[Any, ...]
    loss: Loss | None = None

    @classmethod
    def of(cls, data: Any, loss: Loss | None) -> Trial:
        """From what a user gave: one batch, or several in any iterable.

        Raises:
            CalibrationError: there is no batch.
        """
        batches = as_batches(data)
        if not batches:
            raise CalibrationError("no batch was given; pass data=(inputs, target), or several such pairs")
        return cls(batches, loss)

    def value(self, model: nn.Module, batch: Any, temperature: float = 1.0) -> Tensor:
        """The loss of one batch, the outputs (logits) divided by `temperature` before.

        Raises:
            CalibrationError: the batch has no target, there is no loss, or it is not a scalar with a gradient.
        """
        inputs, target = _parts(batch)
        output = call(model, inputs)
        if temperature != 1.0:
            output = self._cooled(output, temperature)
        loss = getattr(output, "loss", None) if self.loss is None else self.loss(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise CalibrationError(
                f"the loss must be a scalar that depends on the weights, got {got}; pass loss=, a function of "
                "(output, target) such as torch.nn.functional.cross_entropy, and call without torch.no_grad"
            )
        return loss

    def _cooled(self, output: Any, temperature: float) -> Any:
        if self.loss is None:
            raise CalibrationError("outputs are divided by a temperature before the loss; pass loss=, or temperature=1")
        if isinstance(output, Tensor):
            return output / temperature
        if isinstance(getattr(output, "logits", None), Tensor):
            cooled = copy.copy(output)
            cooled.logits = output.logits / temperature
            return cooled
        raise CalibrationError(
            f"the model returns {type(output).__name__}, its logits are unknown; return a tensor, or temperature=1"
        )


def as_batches(data: Any) -> tuple[Any, ...]:
    """One batch or an iterable of them → batches. A DataLoader's batch, the list [inputs, target], is one."""
    if data is None:
        return ()
    if isinstance(data, (Tensor, Mapping)):
        return (data,)
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if pair and (isinstance(data[0], Tensor) or (not isinstance(data[0], list) and isinstance(data[1], Tensor))):
        return (data,)
    if not isinstance(data, Iterable):
        raise CalibrationError(f"data is a batch or an iterable of batches, got {type(data).__name__}")
    return tuple(data)


def _parts(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return batch, batch
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise CalibrationError(
        f"a batch is a pair (inputs, target) or a mapping, got {type(batch).__name__}; "
        "several inputs go into one tuple: ((x, y), target)"
    )


def inputs_of(batch: Any) -> Any:
    """What the model takes of a batch; a bare tensor is all input."""
    return batch if isinstance(batch, Tensor) else _parts(batch)[0]


def call(model: nn.Module, inputs: Any) -> Any:
    """model(**inputs), model(*inputs) or model(inputs)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


class _Inside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[nn.Module], T]) -> T:
        return work(self.model)


def inside(model: nn.Module, tensors: Mapping[str, Tensor], work: Callable[[nn.Module], T]) -> T:
    """work(model), while `tensors` stand for its parameters of these names and copies for its buffers.

    So nothing of the model changes: weights, `.grad`, statistics of batch norms and random state are as before.

    Raises:
        CalibrationError: the model or the loss fails.
    """
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    stand_ins = {f"model.{name}": x for name, x in {**buffers, **tensors}.items()}
    try:
        with torch.enable_grad(), _same_lots(tensors):
            return functional_call(_Inside(model), stand_ins, (work,))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(
            f"the model or the loss failed on the data given: {type(error).__name__}: {error}; check that "
            "loss(model(inputs), target) runs by itself"
        ) from error


@contextmanager
def _same_lots(tensors: Mapping[str, Tensor]) -> Any:
    with torch.random.fork_rng({x.device for x in tensors.values() if x.device.type == "cuda"}):
        yield


def require_reached(asked: Iterable[str], reached: set[str]) -> None:
    """Raise CalibrationError, naming the layers, if some weights had no part in what was computed."""
    missed = [n.removesuffix(".weight") for n in asked if n not in reached]
    if missed:
        raise CalibrationError(
            f"no gradient reached {len(missed)} layers ({', '.join(missed[:5])}); use them in data=, or skip= them"
        )
