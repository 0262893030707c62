"""A trial: whether kernels can be compiled and run here at all, found out by running a small one."""

from __future__ import annotations

import functools

import numpy as np

from gossamer.core.errors import DispatchError

_ROWS, _FEATURES, _WIDTH = 3, 16, 64


@functools.cache
def cannot_compile() -> str | None:
    """Why no CPU kernel runs here: Numba is missing, broken or switched off, or its code is wrong; None if they run.

    Asked once per process. What cannot run is refused at dispatch with this reason, and torch computes instead.
    """
    try:
        got = _transposed(np.arange(_ROWS * _FEATURES, dtype=np.float32))
    except Exception as error:  # a broken compiler may raise anything
        lines = str(error).strip().splitlines() or [""]
        return f"its compiler does not work here ({type(error).__name__}: {lines[0]}); 'gossamer doctor' tells more"
    want = np.zeros((_FEATURES, _WIDTH), np.float32)
    want[:, :_ROWS] = np.arange(_ROWS * _FEATURES, dtype=np.float32).reshape(_ROWS, _FEATURES).T
    return None if np.array_equal(got, want) else "its compiler gives wrong code here: a trial kernel was off"


def need_kernels(what: str, instead: str) -> None:
    """Refuse what has no way without kernels.

    Raises:
        DispatchError: no kernel runs here; the reason, and what to do instead.
    """
    if reason := cannot_compile():
        raise DispatchError(f"{what} needs the CPU kernels, and {reason}; {instead}")


def _transposed(x: np.ndarray) -> np.ndarray:
    """Rows to a token panel: vectors, helpers and atomic counters, as in every kernel."""
    # On numpy's memory, for a tracer may have put itself between us and torch's.
    from gossamer.kernels.cpu.tokens import plan_rows_to_panels

    y = np.full((_FEATURES, _WIDTH), np.nan, np.float32)
    plan_rows_to_panels(1, _ROWS, _FEATURES).run(x.ctypes.data, y.ctypes.data)
    return y
