"""A callback for Lightning."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..core.errors import TargetError, need
from ..core.sparsifier import Sparsifier
from .late import Late

if TYPE_CHECKING:
    from lightning.pytorch import Callback


def lightning_callback(method: str | Sparsifier, **options: object) -> Callback:
    """Sparse training in `lightning.Trainer`: attaches when fitting begins, steps with the optimizer.

    Checkpoints hold masks and the method's state, so `trainer.fit(module, ckpt_path=...)` goes on exactly. At the end
    of `fit` the masks are taken away and the module is a plain one with zeros in its weights; checkpoints of the run
    still load into it, as `trainer.test(module, ckpt_path="best")` does. The length of the run is the Trainer's.
    `callback.handle` is the handle while training.

    Args:
        method: a registered name, or a Sparsifier.
        options: of `gossamer.attach`: density=, allocation=, targets=, skip=, and the method's own.

    Raises:
        MissingDependency: lightning is not installed.
        TargetError: the module has several optimizers; attach by hand there.

    Example:
        >>> callback = lightning_callback("rigl", density=0.1)  # doctest: +SKIP
        >>> lightning.Trainer(max_epochs=3, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    """
    return _callback()(Late(method, options))


@lru_cache
def _callback() -> type[Any]:
    """The class, made on first use: its parent lives in lightning."""
    parts = need("lightning.pytorch", "lightning")

    class SparseCallback(parts.Callback):
        """See `lightning_callback`."""

        def __init__(self, late: Late) -> None:
            self.late, self._seen, self._loaded = late, 0, None

        @property
        def handle(self) -> object:
            return self.late.handle

        def setup(self, trainer, pl_module, stage):
            self._loaded = None  # a checkpoint is loaded after this, for evaluation too
            self.late.expect(pl_module)

        def on_fit_start(self, trainer, pl_module):
            if len(trainer.optimizers) != 1:
                raise TargetError(
                    f"the sparse callback steps with one optimizer, the module has {len(trainer.optimizers)}; "
                    "call gossamer.attach and handle.step() in the module instead"
                )
            steps = trainer.estimated_stepping_batches
            length = None if math.isinf(steps) else int(steps)
            self.late.begin(pl_module, trainer.optimizers[0], length, self._loaded)

        def on_train_start(self, trainer, pl_module):
            self._seen = trainer.global_step

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step > self._seen:  # not while gradients accumulate
                self._seen = trainer.global_step
                self.late.handle.step()

        def on_fit_end(self, trainer, pl_module):
            self.late.end()

        def state_dict(self):
            return self.late.handle.state_dict() if self.late.handle else {}

        def load_state_dict(self, state):
            self._loaded = state or None

    return SparseCallback
