"""The exception tree. Every message says what was wrong, what was got, and how to fix it.

GossamerError
├── PatternError, BudgetError, TargetError, NonFiniteError, FormatError, FileDamaged   (also ValueError)
├── UnknownName          (also ValueError): a name that is not registered, with near names
├── DispatchError        (also RuntimeError): a kernel was named that cannot serve
├── AssetError           (also RuntimeError): a packaged model or set could not be had, or has a wrong hash
├── CalibrationError     (also RuntimeError): calibration data could not be run through the model
└── MissingDependency    (also ImportError): an optional library is needed
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType


class GossamerError(Exception):
    """Root of every error that gossamer raises on purpose."""


class PatternError(GossamerError, ValueError):
    """A pattern cannot be parsed, or does not fit the tensor it was given."""


class BudgetError(GossamerError, ValueError):
    """A budget or a schedule is outside its range."""


class TargetError(GossamerError, ValueError):
    """A target matches nothing, or a layer cannot be pruned as asked."""


class NonFiniteError(GossamerError, ValueError):
    """NaN or infinity where numbers are needed; the message names the tensor."""


class FormatError(GossamerError, ValueError):
    """A tensor or its parts do not fit the storage format."""


class FileDamaged(GossamerError, ValueError):
    """A saved file is truncated, altered, or disagrees with its own record."""


class UnknownName(GossamerError, ValueError):
    """A name that nothing is registered under."""


class DispatchError(GossamerError, RuntimeError):
    """A backend was named that cannot run this product; the message lists every refusal."""


class AssetError(GossamerError, RuntimeError):
    """A packaged model or data set could not be fetched, or is not the file that was pinned."""


class CalibrationError(GossamerError, RuntimeError):
    """Calibration data are missing, or do not run through the model."""


class MissingDependency(GossamerError, ImportError):
    """An optional library is needed for this call."""


def near(got: str, known: Iterable[str]) -> str:
    """Say which known names are close to `got`, or list them all when none is."""
    names = sorted(known)
    close = get_close_matches(got, names, n=4, cutoff=0.5)
    return f"did you mean {', '.join(map(repr, close))}?" if close else f"known: {', '.join(names)}"


def unknown(kind: str, got: str, known: Iterable[str]) -> UnknownName:
    """Build the error for a name that is not registered: `raise unknown("method", "wnda", registry)`."""
    return UnknownName(f"no {kind} is called {got!r}; {near(got, known)}")


def need(module: str, extra: str) -> ModuleType:
    """Import an optional library, or say which extra brings it.

    Raises:
        MissingDependency: the library is not installed; install the named extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"{module} is needed here and could not be imported ({error}); pip install 'gossamer[{extra}]'"
        ) from error
