"""How a sparsifier holds on to a torch model: targets by name, masks by parametrize, calibration by paused passes."""

from .adapters import Adapters
from .adapting import adapt, load_adapter
from .calibrate import stream
from .delta import Adapter, Delta
from .handle import Handle
from .journal import Journal
from .masked import Masked
from .meter import Flops
from .report import LayerReport, TrainingReport
from .spool import Spool
from .spread import spread
from .statistics import Collector
from .targets import Found, Target, find
from .weights import attach, hold

__all__ = [
    "Adapter",
    "Adapters",
    "Collector",
    "Delta",
    "Flops",
    "Found",
    "Handle",
    "Journal",
    "LayerReport",
    "Masked",
    "Spool",
    "Target",
    "TrainingReport",
    "adapt",
    "attach",
    "find",
    "hold",
    "load_adapter",
    "spread",
    "stream",
]
