"""Batches: what a model is called with, and whether they fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..core.errors import CalibrationError

Batch = Mapping[str, object] | Sequence[object] | Tensor
_IDS = ("input_ids", "decoder_input_ids")


def call(model: nn.Module, batch: Batch) -> object:
    """model(**batch) for mappings, model(*batch) for tuples and lists, model(batch) otherwise."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def describe(batch: Batch) -> str:
    """Names and shapes, for messages."""
    if isinstance(batch, Mapping):
        return ", ".join(
            f"{k} {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in batch.items()
        )
    return str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__


def check_tokens(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        CalibrationError: an id is negative, or not below the vocabulary's size; use the model's own tokenizer.
    """
    rows = _rows(model)
    for i, batch in enumerate(batches if rows else ()):
        for key in _IDS:
            ids = batch.get(key) if isinstance(batch, Mapping) else None
            if not isinstance(ids, Tensor) or not ids.numel():
                continue
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= rows:
                raise CalibrationError(
                    f"calibration batch {i} holds token ids from {low} to {high} ({key}), but the model's vocabulary "
                    f"has {rows} entries, 0 to {rows - 1}; make the batches with this model's own tokenizer"
                )


def _rows(model: nn.Module) -> int:
    """Rows of the input embedding; 0 where a model has none."""
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return 0
    return getattr(table, "num_embeddings", 0)
