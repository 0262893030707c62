"""Packaged models and data sets: fetched by name, pinned by hash, cached, usable offline."""

from gossamer.data.images import ImageSet, LabelledImages, fashion_mnist, foolbox_images, mnist
from gossamer.data.language import embed, encode_batches, mean_pool, perplexity, token_windows
from gossamer.data.models import load_model, load_tokenizer, normalise
from gossamer.data.reber import Strings, is_reber, reber
from gossamer.data.registry import Asset, asset, assets
from gossamer.data.series import LabelledSeries, SeriesSet, ucr_crop
from gossamer.data.store import cache_dir, cached, fetch, remove, verify
from gossamer.data.text import LabelledTexts, TextSet, movie_reviews, trec, wikitext2

__all__ = [
    "Asset",
    "ImageSet",
    "LabelledImages",
    "LabelledSeries",
    "LabelledTexts",
    "SeriesSet",
    "Strings",
    "TextSet",
    "asset",
    "assets",
    "cache_dir",
    "cached",
    "embed",
    "encode_batches",
    "fashion_mnist",
    "fetch",
    "foolbox_images",
    "is_reber",
    "load_model",
    "load_tokenizer",
    "mean_pool",
    "mnist",
    "movie_reviews",
    "normalise",
    "perplexity",
    "reber",
    "remove",
    "token_windows",
    "trec",
    "ucr_crop",
    "verify",
    "wikitext2",
]
