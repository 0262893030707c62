"""Training loops of other libraries: a method as one callback. Accelerate needs none, see `docs/guide/training.md`.

And sweeps on Ray's workers, see `docs/guide/sweeps.md`.
"""

from .adapting import adapter_callback
from .lightning import lightning_callback
from .sweeps import sweep
from .trainer import trainer_callback

__all__ = ["adapter_callback", "lightning_callback", "sweep", "trainer_callback"]
