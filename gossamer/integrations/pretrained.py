"""save_pretrained and load_pretrained: pruned and packed models in folders that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..core.errors import FileDamaged, GossamerError, TargetError, need, unknown
from ..core.files import whole_folder
from ..data.models import _no_bars
from ..deploy.layers import matrix_of, packed_layers, refuse_masks
from ..deploy.save import Tokenizer
from ..formats.layouts import BITMASK, SPARSE_24_BITMASK, SPARSE_BITMASK, Layout
from ..recipes.prune import PruneReport
from . import neighbours, shards
from .packing import packing_record
from .zeros import sparsity_record

CONFIG = "config.json"
LAYOUTS: dict[str, Layout | None] = {
    "dense": None,
    "packed": BITMASK,
    SPARSE_BITMASK.name: SPARSE_BITMASK,
    SPARSE_24_BITMASK.name: SPARSE_24_BITMASK,
}


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "dense",
    tokenizer: Tokenizer | None = None,
    report: PruneReport | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Write a transformers model, pruned or packed, as a folder that transformers knows.

    `config.json` gains an entry `gossamer` with the density and the pattern of every sparse layer. What `pack` chose
    for each layer lies in `gossamer-pretrained.json`, with a checksum of each weight file. There is no pickle, and
    nothing half-written ever has the folder's name. The weights are first written dense, so the disk must hold them.

    Args:
        model: a model of transformers; weights of packed layers are written as the dense layers' they came from.
        folder: an earlier folder of `save_pretrained` there is replaced.
        format: "dense": weights with zeros in them, which any transformers loads; "packed": a bit per entry and the
            kept values, which transformers loads after `import gossamer.integrations.transformers`;
            "sparse-bitmask" or "sparse-24-bitmask": as compressed-tensors up to 0.14 writes them.
        tokenizer: saved beside the model.
        report: what `prune` gave; its method and pattern are noted in the record.
        max_shard_size: of one file, before zeros are left out; "5GB" or a number of bytes.

    Returns:
        The folder.

    Raises:
        UnknownName: no such format.
        TargetError: not a model of transformers, masks still attached, no values yet, weights quantised by somebody
            else, or packed layers that dense weights do not describe (4-bit ones); use `gossamer.save`.
        FormatError: "sparse-24-bitmask" of a sparse layer that keeps more than 2 of 4; the layer is named.
        GossamerError: the folder holds something else, or the disk is full; nothing is left behind.

    Example:
        >>> report = gossamer.prune(model, "wanda", density=0.5, data=batches)  # doctest: +SKIP
        >>> gossamer.save_pretrained(model, "sparse", format="packed", report=report)  # doctest: +SKIP
    """
    if format not in LAYOUTS:
        raise unknown("format of files", format, LAYOUTS)
    path, layout = Path(folder), LAYOUTS[format]
    _refuse(model, path)
    neighbours.settle(model)
    record, packing = sparsity_record(model, report), packing_record(model)
    try:
        with whole_folder(path) as draft:
            with _no_bars():
                model.save_pretrained(draft, state_dict=_dense_state(model), max_shard_size=max_shard_size)
            entry = _leave_out(draft, layout)
            _amend(draft / CONFIG, record, entry)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(draft))
            shards.write_sidecar(draft, packing)
    except (OSError, SafetensorError) as error:
        raise GossamerError(
            f"the model could not be written to {path}: {error}; make room or choose another place "
            "(nothing was left behind, and an earlier save there is as it was)"
        ) from error
    return path


def _refuse(model: nn.Module, path: Path) -> None:
    refuse_masks(model)
    if not isinstance(model, need("transformers", "text").PreTrainedModel):
        raise TargetError(
            f"save_pretrained takes models of transformers, got {type(model).__name__}; use gossamer.save"
        )
    if on_meta := [name for name, t in model.state_dict().items() if t.is_meta]:
        raise TargetError(f"{len(on_meta)} tensors are on the meta device ({on_meta[0]} ...) and have no values")
    if path.is_file():
        raise GossamerError(f"{path} is a file; save_pretrained writes a folder, so choose another name")
    if path.is_dir() and any(path.iterdir()) and not (path / shards.SIDECAR).exists():
        raise GossamerError(
            f"{path} holds files that save_pretrained of gossamer did not write and would replace; choose a new folder"
        )


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the dense model that this one was packed from."""
    state = model.state_dict()
    for name, layer in packed_layers(model).items():
        matrix = matrix_of(layer)
        for key in [key for key in state if key.startswith(f"{name}.")]:
            del state[key]
        # A convolution gives its weight in its own shape, Conv1D stores the matrix turned.
        state[f"{name}.weight"] = (matrix.weight.t() if matrix.transposed else layer.weight).contiguous()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()
    return state


def _leave_out(draft: Path, layout: Layout | None) -> dict[str, Any] | None:
    """Pack the files; the entry of config.json that says so, None where they stay dense."""
    if layout is None:
        return None
    written = shards.leave_out_zeros(draft, layout, neighbours.unfit(layout))
    return neighbours.entry(layout, written)


def _amend(file: Path, record: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> None:
    config = json.loads(file.read_text())
    config["gossamer"] = record
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    file.write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a folder, as it stands.

    Raises:
        FileDamaged: there is none, or it cannot be read.
    """
    file = Path(folder) / CONFIG
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileDamaged(f"{folder} holds no {CONFIG}; give a folder that save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise FileDamaged(f"{file} cannot be read ({error}); restore it or save the model again") from error
    if not isinstance(config, dict):
        raise FileDamaged(f"{file} holds no configuration; restore it or save the model again")
    return config
