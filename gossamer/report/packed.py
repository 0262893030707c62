"""From what packing measured to the rows of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .record import LayerRow

if TYPE_CHECKING:
    from ..deploy import PackReport


def layer_rows(setting: str, report: PackReport) -> list[LayerRow]:
    """One row per layer that was measured; those that were skipped are named in the report's own list."""
    return [
        LayerRow(
            setting,
            layer.name,
            layer.shape,
            layer.density,
            layer.format,
            layer.backend,
            layer.dense_ms,
            layer.best_dense_ms,
            layer.ms,
            layer.reason,
        )
        for layer in report.layers
    ]
