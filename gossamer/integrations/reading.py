"""load_pretrained: a folder of `save_pretrained` back into memory, packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..core.errors import FileDamaged, TargetError
from ..data.models import _no_bars
from ..deploy.examples import Example
from ..deploy.pack import pack
from ..formats.layouts import Layout
from . import neighbours, shards
from .packing import pack_again
from .pretrained import read_config
from .zeros import compare

TOKENS = 128


def load_pretrained(
    folder: str | Path,
    *,
    example: Example | None = None,
    dense: bool = False,
    dtype: str | torch.dtype = "auto",
    verify: bool = True,
) -> nn.Module:
    """Read a folder of `gossamer.save_pretrained`, of any of its formats, as a packed model.

    Layers that were packed when the model was saved are packed as they were. A model that was only pruned is packed
    now, by measuring on this machine.

    Args:
        folder: the folder; one that transformers saved again, or compressed-tensors up to 0.14 wrote, does as well.
        example: what the model will be called with, for a model that was only pruned; 128 tokens where None.
        dense: leave every layer dense.
        dtype: of the weights; "auto" is that of the file.
        verify: compare checksums (about a second per gigabyte). Densities are always compared.

    Returns:
        The model, in eval mode.

    Raises:
        FileDamaged: a file is missing, truncated, altered, or disagrees with the record; it is named.
        TargetError: the model sees something other than text and was never packed; give an example.

    Example:
        >>> model = gossamer.load_pretrained("sparse")  # doctest: +SKIP
    """
    path = Path(folder)
    config, sidecar = read_config(path), shards.read_sidecar(path)
    if verify:
        shards.verify(path)
    model = _dense(path, config, dtype).eval()
    if "gossamer" in config:
        compare(model, config["gossamer"])
    if dense:
        return model
    if sidecar is not None and sidecar["layers"]:
        return pack_again(model, sidecar)
    return pack(model, example if example is not None else _example(path, model), inplace=True)


def was_packed(folder: str | Path) -> bool:
    """Whether the model in a folder was packed when it was saved, so that nothing has to be measured."""
    sidecar = shards.read_sidecar(Path(folder))
    return sidecar is not None and bool(sidecar["layers"])


def _dense(path: Path, config: Mapping[str, Any], dtype: str | torch.dtype) -> nn.Module:
    from .transformers import register

    register()
    layout = neighbours.layout_of(config)
    try:
        with _no_bars() as transformers:
            cls = _class(transformers, path, config)
            how = {"dtype": dtype, "output_loading_info": True}
            if layout is None:
                model, told = cls.from_pretrained(path, local_files_only=True, **how)
            else:
                plain = _without_layout(transformers, path)
                model, told = cls.from_pretrained(None, config=plain, state_dict=unfolded(path, layout), **how)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, FileDamaged):
            raise
        raise FileDamaged(f"transformers cannot load {path}: {error}; restore it or save the model again") from error
    if wrong := sorted({*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])}):
        raise FileDamaged(f"{path} holds no fitting weights for {wrong[0]!r}; restore it or save the model again")
    return model


def _class(transformers: Any, path: Path, config: Mapping[str, Any]) -> type:
    name = (config.get("architectures") or [""])[0]
    found = getattr(transformers, name, None) if name.isidentifier() else None
    if found is None:
        version = transformers.__version__
        raise FileDamaged(f"{path} holds a {name!r}, which transformers {version} does not know; install one that does")
    return found


def _without_layout(transformers: Any, path: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    del config.quantization_config
    return config


def unfolded(folder: str | Path, layout: Layout) -> dict[str, Tensor]:
    """Every tensor of a folder by its own name, the weights of a compressed-tensors layout dense again.

    Raises:
        FileDamaged: a file cannot be read, or a weight's parts disagree; it is named.
    """
    tensors = {name: t for file in shards.shards(Path(folder)) for name, t in shards.tensors_of(file)}
    ending = f".{layout.names('.weight')[0].rpartition('.')[2]}"
    weights = [f"{name.removesuffix(ending)}.weight" for name in tensors if name.endswith(ending)]
    for weight in (w for w in weights if layout.holds(w, tensors)):
        dense = layout.weight(weight, tensors)
        for part in layout.names(weight):
            del tensors[part]
        tensors[weight] = dense
    return tensors


def _example(path: Path, model: nn.Module) -> Example:
    config = model.config
    if getattr(model, "main_input_name", "") != "input_ids":
        raise TargetError(
            f"{path} was never packed and reads {getattr(model, 'main_input_name', 'no text')!r}; give "
            "load_pretrained(folder, example=...) what the model will be called with, or dense=True"
        )
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    words = config.get_text_config().vocab_size
    ids_BT = torch.randint(words, (1, length), generator=torch.Generator().manual_seed(0))
    encoded = {"decoder_input_ids": ids_BT} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids_BT, **encoded}
