"""How a sparsifier holds on to a torch model: targets by name, masks by parametrize, calibration by paused passes."""

from .calibrate import Collector, stream
from .journal import Journal
from .targets import Found, Target, find
from .weights import Handle, Masked, attach, hold

__all__ = ["Collector", "Found", "Handle", "Journal", "Masked", "Target", "attach", "find", "hold", "stream"]
