"""Tiny models with random weights, saved as transformers saves them, and a way to run the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

WORDS = [f"word{i}" for i in range(60)]


@pytest.fixture
def gossamer() -> Callable[..., object]:
    """gossamer("methods", "--json") → a result with exit_code, stdout and stderr."""
    from gossamer.cli.app import app

    return lambda *args: CliRunner().invoke(app, [str(a) for a in args], prog_name="gossamer")


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)


def llama(folder: Path, *, width: int = 32, layers: int = 2) -> Path:
    """A Llama with random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    drawn = torch.randint(len(WORDS), (40, 30), generator=torch.Generator().manual_seed(1))
    file.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in drawn.tolist()))
    return file


def record(result: object) -> dict:
    """The JSON object that a command printed, after checking that it ended well and printed nothing else."""
    assert result.exit_code == 0, result.stderr + result.stdout
    return json.loads(result.stdout)
