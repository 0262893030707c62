"""MODEL on the command line: a folder, a packaged asset, or a hub id; and examples to run it on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.errors import AssetError, FileDamaged, GossamerError, UnknownName, near, need

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD, SIDECAR = "gossamer.json", "gossamer-pretrained.json"
PICTURE = (3, 224, 224)
CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Loaded:
    """A model and what is needed to feed it.

    Args:
        spec: as typed.
        tokenizer: None for models that see pictures, and where the folder holds none.
        asset: its name, where it is a packaged one.
    """

    spec: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    asset: str | None = None

    @property
    def config(self) -> object | None:
        """transformers' record of the architecture, or None."""
        return getattr(self.model, "config", None)

    @property
    def causal(self) -> bool:
        """True for a model that predicts the next token."""
        return type(self.model).__name__.endswith(CAUSAL)

    @property
    def longest(self) -> int | None:
        """Tokens that the model has positions for, or None where it does not say."""
        return getattr(self.config, "max_position_embeddings", None)


def load(spec: str, *, packed: bool = False) -> Loaded:
    """Load a model by folder, asset name or hub id, on the CPU, in the dtype it is stored in.

    "hf:" before a folder or a hub id says that transformers loads it, whatever else has that name.

    Args:
        packed: pack the layers of a `save_pretrained` folder as they were; what `save` wrote always is as it was.

    Raises:
        UnknownName: it is none of the three; near asset names are listed.
        FileDamaged: the folder is not a saved model.
        AssetError: a hub id that cannot be had from here.
    """
    from ..data.models import LOADERS

    if spec.startswith("hf:"):
        return _from_transformers(spec.removeprefix("hf:"))
    if Path(spec).is_dir():
        return _from_folder(Path(spec), packed)
    if spec in LOADERS:
        return _from_asset(spec)
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        return _from_transformers(spec)
    raise UnknownName(
        f"{spec!r} is no folder and no packaged model; {near(spec, LOADERS)} "
        "(a hub id has the form owner/name and is loaded by transformers)"
    )


def load_on_disk(spec: str) -> Loaded:
    """A checkpoint's folder whose weights stay in its shards; see `gossamer.on_disk`.

    Raises:
        FileDamaged: it is no such folder, or a shard is damaged.
    """
    from ..attach.shelf import on_disk

    folder = spec.removeprefix("hf:")
    with quiet():
        return Loaded(spec, on_disk(folder), _tokenizer(folder))


def _from_folder(folder: Path, packed: bool) -> Loaded:
    if (folder / RECORD).exists():
        from ..deploy import load as load_saved

        return Loaded(str(folder), load_saved(folder), _tokenizer(folder))
    if (folder / SIDECAR).exists():
        from ..integrations.reading import load_pretrained, was_packed

        model = load_pretrained(folder, dense=not (packed and was_packed(folder)))
        return Loaded(str(folder), model, _tokenizer(folder))
    if not (folder / "config.json").exists():
        raise FileDamaged(f"{folder} holds neither {RECORD} nor config.json; give the folder of a saved model")
    return _from_transformers(str(folder))


def _from_asset(name: str) -> Loaded:
    from ..data import load_model, load_tokenizer
    from ..data.models import NORMALISATION
    from ..data.store import cached, fetch
    from .screen import bar

    if not cached(name):
        with bar(f"fetching {name}") as report:
            fetch(name, progress=lambda done, total: report("", done, total))
    return Loaded(name, load_model(name), None if name in NORMALISATION else load_tokenizer(name), name)


def _from_transformers(spec: str) -> Loaded:
    from ..integrations.transformers import register

    register()  # so that it reads packed folders
    local = Path(spec).is_dir()
    try:
        with quiet() as transformers:
            config = transformers.AutoConfig.from_pretrained(spec, local_files_only=local)
            model = _class(transformers, config).from_pretrained(spec, dtype="auto", local_files_only=local)
    except (OSError, ValueError) as error:
        kind = FileDamaged if local else AssetError
        raise kind(f"transformers cannot load {spec!r}: {_first_line(error)}") from error
    return Loaded(spec, model.eval(), _tokenizer(spec))


def _class(transformers: ModuleType, config: object) -> type:
    """The very class that was saved, so that no head is lost; AutoModel where the config does not say."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None) or transformers.AutoModel


def _tokenizer(where: str | Path) -> PreTrainedTokenizerBase | None:
    local = Path(where).is_dir()
    if local and not any((Path(where) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return need("transformers", "text").AutoTokenizer.from_pretrained(where, local_files_only=local)
    except (OSError, ValueError, KeyError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet() -> Iterator[ModuleType]:
    """transformers without its own progress bars and advice, which would tear ours."""
    transformers = need("transformers", "text")
    logs = need("transformers.utils.logging", "text")
    bars, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity(logging.ERROR)
    try:
        yield transformers
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def example(loaded: Loaded, *, tokens: int, batch: int) -> dict[str, Tensor] | Tensor:
    """Something to call the model with: random tokens, or random pictures; times do not depend on the values.

    Args:
        tokens: per text; ignored by models that see pictures.
        batch: texts or pictures at once.

    Raises:
        GossamerError: the model has fewer positions than that, or nothing says what it eats.
    """
    generator = torch.Generator().manual_seed(0)
    words = getattr(loaded.config, "vocab_size", None)
    if words is None:
        return torch.randn(batch, *PICTURE, generator=generator)
    check_length(loaded, tokens)
    ids_BT = torch.randint(words, (batch, tokens), generator=generator)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if getattr(loaded.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids_BT
    return inputs


def check_length(loaded: Loaded, tokens: int) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        GossamerError: there are more; take fewer.
    """
    if loaded.longest is not None and tokens > loaded.longest:
        raise GossamerError(
            f"{loaded.spec} has positions for {loaded.longest} tokens, {tokens} were asked for; take fewer"
        )
