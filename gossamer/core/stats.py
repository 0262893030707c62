"""Statistics of a layer's input, as scores and solvers ask for them: checked once, here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .errors import CalibrationError
from .sparsifier import require_finite


def statistic(stats: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    """The statistic `name`, of the shape the weight asks for.

    Args:
        stats: what calibration collected for one layer, per input column of the weight seen as [rows, columns].
        name: over tokens, "input_norm" = sqrt(mean of x²), "input_mean", "input_var", or "gram" = mean of x xᵀ.
        shape: expected shape, such as (columns,).

    Raises:
        CalibrationError: the statistic was not collected, or belongs to another layer.
        NonFiniteError: it holds NaN or infinity: an activation overflowed, so calibrate in float32.
    """
    if name not in stats:
        raise CalibrationError(
            f"statistic {name!r} is missing (got {sorted(stats) or 'none'}); pass calibration data (data=...)"
        )
    if tuple(stats[name].shape) != tuple(shape):
        raise CalibrationError(
            f"statistic {name!r} has shape {tuple(stats[name].shape)}, but this weight needs {tuple(shape)}; "
            "collect it from the inputs of the same layer"
        )
    require_finite(stats[name], f"the calibration statistic {name!r}")
    return stats[name]
