"""Packaged text sets, each with a fixed split: the same texts on every machine and in every year."""

from __future__ import annotations

import csv
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gossamer.core.errors import unknown
from gossamer.data.store import fetch

REVIEW_SOURCES = {"rotten_tomatoes": 2000, "imdb": 5000}
SPLIT_SEED = 0
TREC_TEST = 500
TREC_COARSE = ("description", "entity", "abbreviation", "human", "number", "location")
WIKITEXT_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, their labels as indices into `names`, and the names of the classes."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextSet:
    """A labelled text set, split."""

    train: LabelledTexts
    test: LabelledTexts


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _labelled(pairs: list[tuple[str, int]], names: tuple[str, ...]) -> LabelledTexts:
    return LabelledTexts(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), names)


def _draw(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def held_out(pairs: list[tuple[str, int]], *, count: int, seed: int = SPLIT_SEED) -> set[str]:
    """Choose the texts held out: in each class, in proportion, those whose SHA-256 with the seed is lowest.

    A hash, not a random generator: the split depends on nothing but the texts, so it survives a change of
    library, of row order and of platform.
    """
    chosen: set[str] = set()
    for label in sorted({label for _, label in pairs}):
        texts = sorted((text for text, its in pairs if its == label), key=lambda text: _draw(text, seed))
        chosen.update(texts[: round(count * len(texts) / len(pairs))])
    return chosen


def movie_reviews(source: Literal["rotten_tomatoes", "imdb"] = "rotten_tomatoes") -> TextSet:
    """Positive and negative film reviews with a fixed, class-balanced split.

    The package has no official test half, so ours is the text-hash split of `held_out`, seed 0. Repeated
    texts (96 in IMDB) are dropped first: one in each half would leak.

    Args:
        source: `"rotten_tomatoes"`: 8,530 one-sentence reviews, 2,000 held out. `"imdb"`: 24,904 long ones,
            5,000 held out.

    Raises:
        UnknownName: `source` is neither.
        AssetError: the asset cannot be had; see `fetch`.

    Example:
        >>> len(movie_reviews("rotten_tomatoes").test)                             # doctest: +SKIP
        2000
    """
    if source not in REVIEW_SOURCES:
        raise unknown("review source", source, REVIEW_SOURCES)
    first = {
        row["text"]: int(row["label"])
        for row in reversed(_rows(fetch("movie-reviews") / "reviews.csv"))
        if row["source"] == source
    }
    pairs = list(reversed(first.items()))
    test = held_out(pairs, count=REVIEW_SOURCES[source])
    names = ("negative", "positive")
    return TextSet(
        train=_labelled([pair for pair in pairs if pair[0] not in test], names),
        test=_labelled([pair for pair in pairs if pair[0] in test], names),
    )


def trec() -> TextSet:
    """TREC questions in 6 coarse classes: 5,452 to train on and the customary 500 to test on.

    Raises:
        AssetError: the asset cannot be had; see `fetch`.
    """
    rows = _rows(fetch("trec") / "trec.csv")
    pairs = [(row["text"], int(row["label-coarse"])) for row in rows]
    return TextSet(train=_labelled(pairs[:-TREC_TEST], TREC_COARSE), test=_labelled(pairs[-TREC_TEST:], TREC_COARSE))


def wikitext2(split: Literal["train", "valid", "test"] = "test") -> str:
    """The raw text of one part of WikiText-2, as published (no `<unk>`, line breaks kept).

    Raises:
        UnknownName: `split` is not train, valid or test.
        AssetError: the asset cannot be had; see `fetch`.
    """
    if split not in WIKITEXT_SPLITS:
        raise unknown("WikiText-2 split", split, WIKITEXT_SPLITS)
    return gzip.decompress((fetch("wikitext2") / f"{split}.raw.gz").read_bytes()).decode("utf-8")
