"""A callback that runs adapters in `transformers.Trainer` and in what is built on it, such as TRL's trainers."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..attach import Adapters
from ..core.errors import need

if TYPE_CHECKING:
    from transformers import TrainerCallback


def adapter_callback(adapters: Adapters) -> TrainerCallback:
    """Adapters in `transformers.Trainer`: their penalty joins the gradient, and they step with the optimizer.

    Methods without either (s2ft, lora) need no callback. Adapt the model first and hand it to the Trainer, which trains
    what is not frozen. Its checkpoints hold the deltas, so `resume_from_checkpoint=` goes on exactly.

    Raises:
        MissingDependency: transformers is not installed.

    Example:
        >>> adapters = gossamer.adapt(model, "sara", total_steps=1000)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[adapter_callback(adapters)]).train()  # doctest: +SKIP
    """
    return _callback()(adapters)


@lru_cache
def _callback() -> type[Any]:
    """The class, made on first use: its parent lives in transformers."""
    parts = need("transformers.trainer_callback", "text")

    class AdapterCallback(parts.TrainerCallback):
        """See `adapter_callback`."""

        def __init__(self, adapters: Adapters) -> None:
            self.adapters = adapters

        def on_pre_optimizer_step(self, args, state, control, **_):
            penalty = self.adapters.penalty()
            if penalty.requires_grad:
                penalty.backward()

        def on_optimizer_step(self, args, state, control, optimizer=None, **_):
            self.adapters.step(optimizer)

    return AdapterCallback
