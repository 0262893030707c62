"""Training loops of other libraries: a method as one callback. Accelerate needs none, see `docs/guide/training.md`."""

from .lightning import lightning_callback
from .trainer import trainer_callback

__all__ = ["lightning_callback", "trainer_callback"]
