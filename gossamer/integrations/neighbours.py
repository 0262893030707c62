"""Neighbours: what other libraries expect beside the weights, and what they left on a model that is to be saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import TargetError
from ..formats.layouts import BITMASK, SPARSE_24_BITMASK, SPARSE_BITMASK, Layout
from .shards import Written

# The name of the packed format in config.json: what a reader without it is told to import.
METHOD = "gossamer.integrations.transformers"
COMPRESSED_TENSORS = "compressed-tensors"
# The last release that reads and writes the sparse layouts; 0.15 removed them.
LAST_SPARSE_RELEASE = "0.14.0.1"
_STRUCTURE = {SPARSE_BITMASK.name: "unstructured", SPARSE_24_BITMASK.name: "2:4"}


def entry(layout: Layout, written: Written) -> dict[str, Any]:
    """The `quantization_config` of config.json that makes readers of a layout read it."""
    if layout is BITMASK:
        return {"quant_method": METHOD, "layout": layout.name}
    layers = [name.removesuffix(".weight") for name in written.packed]
    return {
        "quant_method": COMPRESSED_TENSORS,
        "version": LAST_SPARSE_RELEASE,
        "sparsity_config": {
            "format": layout.name,
            "global_sparsity": 1 - written.kept / max(written.entries, 1),
            "sparsity_structure": _STRUCTURE[layout.name],
            "targets": layers,
            "ignore": [],
        },
    }


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The compressed-tensors layout that a config.json names; None where it names none."""
    found = config.get("quantization_config") or {}
    named = (found.get("sparsity_config") or {}).get("format")
    known = {layout.name: layout for layout in (SPARSE_BITMASK, SPARSE_24_BITMASK)}
    return known.get(named) if found.get("quant_method") == COMPRESSED_TENSORS else None


def unfit(layout: Layout) -> Callable[[str, Tensor], bool]:
    """Which weights a layout leaves dense: those of compressed-tensors hold matrices only."""
    return (lambda name, w: False) if layout is BITMASK else (lambda name, w: w.dim() != 2)


def settle(model: nn.Module) -> None:
    """Take off what loading from GGUF left, and refuse weights that somebody else quantised.

    A model that transformers dequantised from GGUF keeps its quantizer, and then refuses to be saved although its
    weights are plain.

    Raises:
        TargetError: the weights themselves are quantised.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = getattr(quantizer.quantization_config, "quant_method", "unknown")
    method = str(getattr(method, "value", method))
    blocks = any(type(m).__name__.startswith("Gguf") for m in model.modules())
    if method != "gguf" or blocks:
        raise TargetError(
            f"the model's weights are quantised by {method}; load it dequantised (GGUF: "
            "quantization_config=GgufConfig(dequantize=True)), or call model.dequantize(), before pruning and saving"
        )
    quantizer.remove_quantization_config(model)
