"""--data on the command line: a text file or a packaged set, turned into the batches that calibration runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..core.errors import CalibrationError, near, unknown
from .models import Loaded, check_length

ASSETS = ("movie-reviews", "trec", "wikitext2", "foolbox-images")
LENGTH = 512


def batches(
    loaded: Loaded, source: str, *, samples: int, length: int | None, batch: int, seed: int
) -> list[dict[str, Tensor]] | list[tuple[Tensor]]:
    """Calibration batches.

    A model that predicts the next token gets windows of running text, cut at random places; an encoder gets whole
    lines, drawn at random; a model that sees pictures gets pictures.

    Args:
        source: path of a text file (UTF-8), or "asset:" and one of movie-reviews, trec, wikitext2, foolbox-images.
        samples: texts or windows.
        length: tokens per window, or at which a text is cut; None = 512, or what the model has positions for.
        batch: texts at once.
        seed: of the draw.

    Raises:
        UnknownName: no such packaged set.
        CalibrationError: the file cannot be read or is too short, or the model and the data do not fit together.
    """
    if source == "asset:foolbox-images":
        return _pictures(loaded, samples, batch)
    if loaded.tokenizer is None:
        raise CalibrationError(
            f"{loaded.spec} has no tokenizer, so text cannot be fed to it; save one beside the model, "
            "or calibrate a model that sees pictures with asset:foolbox-images"
        )
    length = length if length is not None else min(LENGTH, loaded.longest or LENGTH)
    check_length(loaded, length)
    lines = _lines(source)
    if loaded.causal:
        return _windows(loaded, lines, samples=samples, length=length, batch=batch, seed=seed)
    return _texts(loaded, lines, samples=samples, length=length, batch=batch, seed=seed)


def _lines(source: str) -> Sequence[str]:
    if source.startswith("asset:"):
        return _asset_lines(source.removeprefix("asset:"))
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = [f"asset:{name}" for name in ASSETS]
        raise CalibrationError(
            f"--data {source!r} cannot be read ({error}); give a UTF-8 text file or a packaged set, "
            + near(source, known)
        ) from error
    return [line for line in text.splitlines() if line.strip()]


def _asset_lines(name: str) -> Sequence[str]:
    from .. import data

    if name == "wikitext2":
        return [line for line in data.wikitext2("train").splitlines() if line.strip()]
    if name == "movie-reviews":
        return data.movie_reviews().train.texts
    if name == "trec":
        return data.trec().train.texts
    raise unknown("packaged set for calibration", name, ASSETS)


def _windows(
    loaded: Loaded, lines: Sequence[str], *, samples: int, length: int, batch: int, seed: int
) -> list[dict[str, Tensor]]:
    from ..data import token_windows

    ids_WT = token_windows(loaded.tokenizer, "\n".join(lines), length=length, count=samples, seed=seed)
    return [{"input_ids": part} for part in ids_WT.split(batch)]


def _texts(
    loaded: Loaded, lines: Sequence[str], *, samples: int, length: int, batch: int, seed: int
) -> list[dict[str, Tensor]]:
    from ..data import encode_batches

    if not lines:
        raise CalibrationError("the calibration text has no line with a word in it; give another")
    drawn = random.Random(seed).sample(list(lines), min(samples, len(lines)))
    encoded = encode_batches(loaded.tokenizer, drawn, batch_size=batch, max_length=length)
    if not getattr(loaded.config, "is_encoder_decoder", False):
        return encoded
    return [{**part, "decoder_input_ids": part["input_ids"]} for part in encoded]


def _pictures(loaded: Loaded, samples: int, batch: int) -> list[tuple[Tensor]]:
    from ..data import foolbox_images, normalise

    if loaded.tokenizer is not None or loaded.asset is None:
        raise CalibrationError(f"pictures fit the packaged vision models, not {loaded.spec}; give it text")
    pictures = normalise(foolbox_images().images[:samples], loaded.asset)
    return [(part,) for part in pictures.split(batch)]
