"""A callback for `transformers.Trainer`."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..core.errors import TargetError, need
from ..core.sparsifier import Sparsifier
from .late import Late

if TYPE_CHECKING:
    from transformers import TrainerCallback


def trainer_callback(method: str | Sparsifier, **options: object) -> TrainerCallback:
    """Sparse training in `transformers.Trainer`: attaches when training begins, steps with the optimizer.

    Checkpoints hold masks and the method's state, so `trainer.train(resume_from_checkpoint=True)` goes on exactly. At
    the end the masks are taken away and the model is a plain one with zeros in its weights. The length of the run is
    the Trainer's. `callback.handle` is the handle while training.

    Args:
        method: a registered name, a Sparsifier, or "hold": a model that was pruned already keeps its zeros.
        options: of `gossamer.attach`: density=, allocation=, targets=, skip=, and the method's own.

    Raises:
        MissingDependency: transformers is not installed.
        TargetError: restore_callback_states_from_checkpoint is set (this callback restores itself), the Trainer has
            two of these callbacks, or it resumes and got the callback by `add_callback` or the model by `model_init`.

    Example:
        >>> callback = trainer_callback("rigl", density=0.1)  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
        >>> SFTTrainer(pruned, train_dataset=data, callbacks=[trainer_callback("hold")]).train()  # doctest: +SKIP
    """
    return _callback()(Late(method, options))


@lru_cache
def _callback() -> type[Any]:
    """The class, made on first use: its parents live in transformers."""
    parts = need("transformers.trainer_callback", "text")

    class SparseCallback(parts.TrainerCallback, parts.ExportableState):
        """See `trainer_callback`. The Trainer writes `state()` into each checkpoint's trainer_state.json."""

        def __init__(self, late: Late) -> None:
            self.late = late

        @property
        def handle(self) -> object:
            return self.late.handle

        def on_init_end(self, args, state, control, model=None, **_):
            if args.restore_callback_states_from_checkpoint:
                raise TargetError("the sparse callback restores itself; leave restore_callback_states_from_checkpoint")
            self.late.expect(model)

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
            saved = state.stateful_callbacks.get(type(self).__name__, {})
            if isinstance(saved, list):
                raise TargetError(
                    f"the Trainer has {len(saved)} sparse callbacks; give it one, and call gossamer.attach and "
                    "handle.step() in a callback of your own for other layers"
                )
            held = saved.get("attributes") or None
            self.late.begin(model, optimizer, state.max_steps, held if state.global_step else None)

        def on_optimizer_step(self, args, state, control, **_):
            self.late.handle.step()

        def on_train_end(self, args, state, control, **_):
            self.late.end()

        def state(self):
            handle = self.late.handle
            return {"args": {}, "attributes": handle.state_dict() if handle else {}}

    return SparseCallback
