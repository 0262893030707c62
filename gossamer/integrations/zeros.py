"""The sparsity record: which layers of a model hold zeros, how many, and by which pattern. It lies in config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..attach.targets import _is_conv1d
from ..core.errors import FileDamaged
from ..deploy.candidates import FEWEST_ZEROS
from ..deploy.layers import CONVOLUTIONS, matrix_of, packed_layers
from ..deploy.structure import detect
from ..deploy.tensors import kept_entries
from ..recipes.prune import PruneReport

VERSION = 1


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of linear layers and convolutions as matrices with outputs first, packed or not, by layer."""
    packed = packed_layers(model)
    for name, module in model.named_modules():
        if name in packed:
            yield name, matrix_of(packed[name]).weight
        elif _is_conv1d(module):
            yield name, module.weight.detach().t()
        elif isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            yield name, module.weight.detach().flatten(1)


def sparsity_record(model: nn.Module, report: PruneReport | None = None) -> dict[str, Any]:
    """Density and structure of every layer with at least 10 % zeros.

    Args:
        report: of the pruning, whose method and pattern are noted.
    """
    from .. import __version__

    layers, entries, kept = {}, 0, 0
    for name, w_MK in matrices(model):
        count = kept_entries(w_MK)
        if w_MK.numel() == 0 or 1 - count / w_MK.numel() < FEWEST_ZEROS:
            continue
        found = detect(w_MK)
        structure = found[0].name if found else "unstructured"
        layers[name] = {"density": count / w_MK.numel(), "kept": count, "structure": structure}
        entries, kept = entries + w_MK.numel(), kept + count
    said = {} if report is None else {"method": report.method, "pattern": report.pattern}
    density = kept / entries if entries else 1.0
    return {"version": VERSION, "gossamer": __version__, **said, "density": density, "layers": layers}


def compare(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Hold a loaded model against its record; fewer kept entries are fine, for narrower dtypes round to zero.

    Raises:
        FileDamaged: a layer is missing, or keeps more than its record says; it is named.
    """
    found = dict(matrices(model))
    for name, want in record["layers"].items():
        if name not in found:
            raise FileDamaged(
                f"the record names layer {name!r}, which this model has not; config and weights are mixed up"
            )
        if (count := kept_entries(found[name])) > want["kept"]:
            raise FileDamaged(
                f"layer {name!r} keeps {count} entries, its record says {want['kept']}: the weights were changed; "
                "save the model again with gossamer.save_pretrained"
            )
