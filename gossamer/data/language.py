"""Feed text to language models: batches, windows, sentence embeddings, perplexity.

Shapes: B texts in a batch, T tokens, D width, V vocabulary, N texts, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

# English averages 4-5 characters a token; tokenizing a little more than needed costs nothing.
CHARACTERS_PER_TOKEN = 6
MARGIN_TOKENS = 8


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def encode_batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 16, max_length: int = 128
) -> list[dict[str, Tensor]]:
    """Tokenize texts into padded batches, in order: what calibration takes.

    Args:
        batch_size: texts in a batch; the last one may hold fewer.
        max_length: tokens at which a text is cut.

    Returns:
        One dict per batch with at least `input_ids` and `attention_mask`, int64 `[B, T]`, T the longest
        text of that batch.
    """
    return list(_batches(tokenizer, texts, batch_size=batch_size, max_length=max_length))


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int, max_length: int
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        yield dict(tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt"))


def mean_pool(hidden_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Average the hidden states of the real tokens: Σ_t m_t·h_t / Σ_t m_t, `[B, D]`.

    Args:
        hidden_BTD: hidden states of the last layer.
        attention_mask_BT: 1 for a real token, 0 for padding; a row of zeros gives zeros.
    """
    mask_BT1 = attention_mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    return (hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)


@torch.no_grad()
def embed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """Embed texts with a sentence encoder: mean over tokens, then unit L2 norm, `[N, D]` in the given order.

    Texts run in order of length, so batches hold little padding.

    Args:
        model: called with `input_ids` and `attention_mask`; gives an object with `last_hidden_state`.
        batch_size: texts in a batch.
        max_length: tokens at which a text is cut; 256 is what MiniLM was trained with.
        progress: called as `progress(texts_done, texts_total)`.

    Raises:
        CalibrationError: `texts` is empty.
    """
    if not texts:
        raise CalibrationError("embed got no texts; pass at least one")
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    ordered, pieces = [texts[index] for index in order], []
    for batch in _batches(tokenizer, ordered, batch_size=batch_size, max_length=max_length):
        inputs = {key: value.to(_device(model)) for key, value in batch.items()}
        pooled_BD = mean_pool(model(**inputs).last_hidden_state, inputs["attention_mask"])
        pieces.append(functional.normalize(pooled_BD, dim=1))
        if progress is not None:
            progress(min(len(pieces) * batch_size, len(texts)), len(texts))
    return torch.cat(pieces)[torch.tensor(order).argsort()]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: the warning about the model's length does not apply, windows are cut below.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, need: int) -> list[int]:
    """The first `need` tokens without tokenizing the whole text; the cut may change only the last few."""
    characters = CHARACTERS_PER_TOKEN * (need + MARGIN_TOKENS)
    while characters < len(text):
        ids = _tokens(tokenizer, text[:characters])
        if len(ids) >= need + MARGIN_TOKENS:
            return ids[:need]
        characters *= 2
    return _tokens(tokenizer, text)[:need]


def _short(got: int, need: int, length: int) -> CalibrationError:
    return CalibrationError(
        f"the text has {got} tokens and {need} are needed for windows of {length}; "
        "use a longer text, fewer or shorter windows"
    )


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, count: int, seed: int | None = None
) -> Tensor:
    """Cut a text into windows of tokens, int64 `[count, length]`, without special tokens.

    Args:
        length: tokens in a window.
        count: windows.
        seed: None takes the first windows one after another, which is how perplexity is measured; a number
            takes windows at random places (they may overlap), which is how calibration data are drawn.

    Raises:
        CalibrationError: the text is too short.

    Example:
        >>> token_windows(tokenizer, wikitext2("test"), length=1024, count=4).shape  # doctest: +SKIP
        torch.Size([4, 1024])
    """
    if seed is None:
        ids = torch.tensor(_first_tokens(tokenizer, text, length * count))
        if len(ids) < length * count:
            raise _short(len(ids), length * count, length)
        return ids.view(count, length)
    ids = torch.tensor(_tokens(tokenizer, text))
    if len(ids) < length:
        raise _short(len(ids), length, length)
    generator = torch.Generator().manual_seed(seed)
    starts_W = torch.randint(len(ids) - length + 1, (count,), generator=generator)
    return ids[starts_W[:, None] + torch.arange(length)]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, *, progress: Progress | None = None) -> float:
    """Perplexity of a causal language model: exp of the mean of -log p(token | those before it in its window).

    Each window starts afresh, and its first token is not predicted: the mean runs over W·(T-1) tokens.

    Args:
        model: called with `input_ids`; gives an object with `logits` `[B, T, V]`.
        windows: token ids `[W, T]`, T at least 2.
        progress: called as `progress(windows_done, windows_total)`.

    Raises:
        CalibrationError: there is nothing to predict.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise CalibrationError(f"windows has shape {tuple(windows.shape)}; pass [windows >= 1, tokens >= 2]")
    total = 0.0
    for done, ids_T in enumerate(windows.to(_device(model)), start=1):
        logits_TV = model(input_ids=ids_T[None]).logits[0, :-1]
        total += functional.cross_entropy(logits_TV.float(), ids_T[1:], reduction="sum").item()
        if progress is not None:
            progress(done, len(windows))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))
