"""A shelf: a transformers model whose blocks stay in the checkpoint's files and are mapped while a forward is in them.

Blocks are the entries of the outermost lists of modules. What lies outside (embeddings, last norm, head) is mapped from
the start. Names and fused tensors are translated by transformers' own rules, so what a block holds is to the bit what
`from_pretrained` would have put there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import FileDamaged, TargetError, need
from ..core.sparsifier import require_finite
from .blocks import entries_of_lists
from .shards import Entry, read_shards, rewrite
from .targets import Target

_WHERE, _NO_THREADS = "gossamer_shelf", "HF_DEACTIVATE_ASYNC_LOAD"


def on_disk(folder: str | Path) -> nn.Module:
    """A model that is larger than memory: it can be called, measured and pruned, one block of it loaded at a time.

    Args:
        folder: a checkpoint that transformers loads, its weights in safetensors shards.

    Returns:
        The model in eval mode, of the class and dtype that its config names, on the CPU. Parameters of blocks are on
        the meta device except while a forward is in their block.

    Raises:
        FileDamaged: the folder is no checkpoint, or a shard is missing, truncated or unreadable; it is named.
        MissingDependency: transformers is not installed.

    Example:
        >>> model = gossamer.on_disk("llama-70b")  # doctest: +SKIP
        >>> gossamer.prune(model, "wanda", density=0.5, data=batches, workdir="work")  # doctest: +SKIP
    """
    folder = Path(folder)
    entries = read_shards(folder)
    stored = next((e.dtype for e in entries.values() if e.dtype.is_floating_point), None)
    model = _skeleton(folder, stored)
    Shelf(model, folder, entries)
    return model


def shelf_of(model: nn.Module) -> Shelf | None:
    """The shelf of a model that `on_disk` made."""
    return getattr(model, _WHERE, None)


class Shelf:
    """Which file holds which parameter, and which block is loaded."""

    def __init__(self, model: nn.Module, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.model, self.folder, self.entries = model, folder, entries
        self.blocks = tuple(entries_of_lists(model))
        self.renewed: dict[str, Callable[[], Tensor]] = {}
        self._seen: set[str] = set()
        self._rules = _rules(model)
        self._keys: dict[str, list[str]] = {block: [] for block in ("", *self.blocks)}
        self._place: dict[str, Entry] = {}
        self._sort()
        self._empty = {block: self._held(block) for block in self.blocks}
        self.loaded = ""
        self._load("")
        model.tie_weights()
        self._refuse_empty({n: p for n, p in model.named_parameters() if not self.block_of(n)})
        for block in self.blocks:
            model.get_submodule(block).register_forward_pre_hook(self._enter(block))
        object.__setattr__(model, _WHERE, self)

    def block_of(self, name: str) -> str:
        """The block that a parameter or module lies in, "" for none."""
        return next((b for b in self.blocks if name.startswith(f"{b}.")), "")

    def open(self, block: str) -> None:
        """Load a block, and let go of the one before.

        Raises:
            FileDamaged: the files lack a weight of it.
            NonFiniteError: a weight holds NaN or infinity; the tensor and its file are named.
        """
        if not block or block == self.loaded:
            return
        self.close()
        self._load(block)
        self.loaded = block
        self._refuse_empty(self._held(block))

    def close(self) -> None:
        """Let go of the loaded block: what was changed in it is gone, unless it was `renew`ed."""
        for name, w in self._empty.get(self.loaded, {}).items():
            _put(self.model, name, w)
        self.loaded = ""

    def renew(self, target: Target, read: Callable[[], Tensor]) -> None:
        """From now on the target's weight is what `read` gives, outputs first."""
        self.renewed[target.parameter] = lambda: target.turned(read())

    def check(self, targets: Sequence[Target]) -> None:
        """Refuse targets whose weight is not one tensor of the files, and so could not be written there.

        Raises:
            TargetError: they are named; skip them.
        """
        fused = [t.name for t in targets if t.parameter not in self._place]
        if fused:
            raise TargetError(
                f"the checkpoint stores {', '.join(fused[:5])} fused with other weights, where pruned ones cannot be "
                "written back; skip= them, or load the model whole"
            )

    def save(self, out: Path, extra: Mapping[str, str] | None = None) -> None:
        """The folder again, with the weights that were renewed; other files as they are. All of it or nothing."""
        rewrite(self.folder, out, {self._place[name]: read for name, read in self.renewed.items()}, extra)

    def _sort(self) -> None:
        """By transformers' rules: which tensors of the files each block is made of."""
        loading = need("transformers.core_model_loading", "text")
        renamings = [r for r in self._rules if not isinstance(r, loading.WeightConverter)]
        converters = [r for r in self._rules if isinstance(r, loading.WeightConverter)]
        meta = self.model.state_dict()
        for key in self.entries:
            name, fused = loading.rename_source_key(key, renamings, converters, self.model.base_model_prefix, meta)
            if name not in meta and key in meta:
                name, fused = key, None
            self._keys[self.block_of(name)].append(key)
            if fused is None and name in meta:
                self._place[name] = self.entries[key]

    def _held(self, block: str) -> dict[str, Tensor]:
        return {f"{block}.{n}": p for n, p in self.model.get_submodule(block).named_parameters(remove_duplicate=False)}

    def _load(self, block: str) -> None:
        loading, utils = need("transformers.core_model_loading", "text"), need("transformers.modeling_utils", "text")
        held = {key: self.entries[key].mapped() for key in self._keys[block]}
        if block not in self._seen:
            for key, w in held.items():
                if w.is_floating_point():
                    require_finite(w, f"{key!r} in {self.entries[key].file}")
        config = utils.LoadStateDictConfig(weight_mapping=self._rules, dtype=self.model.dtype)
        with _quiet(), torch.no_grad():
            loading.convert_and_load_state_dict_in_model(self.model, held, config)
        self._seen.add(block)
        for name, read in self.renewed.items():
            if self.block_of(name) == block:
                _put(self.model, name, nn.Parameter(read(), requires_grad=False))

    def _refuse_empty(self, held: Mapping[str, Tensor]) -> None:
        if empty := [n for n, p in held.items() if p.is_meta]:
            raise FileDamaged(f"{self.folder} lacks {len(empty)} weights of its model ({', '.join(empty[:3])})")

    def _enter(self, block: str) -> Callable[..., None]:
        return lambda module, args: self.open(block)


def _rules(model: nn.Module) -> list[object]:
    return list(need("transformers.conversion_mapping", "text").get_model_conversion_mapping(model, None, None))


def _put(model: nn.Module, name: str, w: Tensor) -> None:
    path, _, key = name.rpartition(".")
    model.get_submodule(path)._parameters[key] = w  # type: ignore[assignment]


def _skeleton(folder: Path, stored: torch.dtype | None) -> nn.Module:
    """The model without its parameters; buffers, which files need not hold, are made as ever."""
    transformers = need("transformers", "text")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FileDamaged(f"{folder} holds no configuration that transformers reads: {error}") from error
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise FileDamaged(f"{folder / 'config.json'} names no class of transformers (architectures: {name!r})")
    with _parameters_on_meta():
        return kind._from_config(config, dtype=config.dtype or stored).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, w: nn.Parameter | None) -> None:
        if w is not None and not w.is_meta:
            w = nn.Parameter(torch.empty_like(w, device="meta"), requires_grad=w.requires_grad)
        register(module, name, w)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without a progress bar and advice per block, and without threads, each of which has a stack."""
    logs = need("transformers.utils.logging", "text")
    bars, level, threads = logs.is_progress_bar_enabled(), logs.get_verbosity(), os.environ.get(_NO_THREADS)
    logs.disable_progress_bar()
    logs.set_verbosity(logging.ERROR)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        logs.set_verbosity(level)
        del os.environ[_NO_THREADS]
        if threads is not None:
            os.environ[_NO_THREADS] = threads
        if bars:
            logs.enable_progress_bar()
