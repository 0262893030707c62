"""Reports: a run's numbers as one self-contained page, as plots, and as a table for the terminal."""

from __future__ import annotations

from .compare import headline, speedup, verdicts
from .figures import FIGURES, figure, write_png
from .packed import layer_rows
from .page import write_report
from .record import EngineRow, LayerRow, Run, Sample, Setting, load_run, write_run
from .terminal import table

__all__ = [
    "FIGURES",
    "EngineRow",
    "LayerRow",
    "Run",
    "Sample",
    "Setting",
    "figure",
    "headline",
    "layer_rows",
    "load_run",
    "speedup",
    "table",
    "verdicts",
    "write_png",
    "write_report",
    "write_run",
]
