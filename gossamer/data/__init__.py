"""Packaged models and data sets: fetched by name, pinned by hash, cached, usable offline."""

from gossamer.data.images import ImageSet, LabelledImages, fashion_mnist, foolbox_images, mnist
from gossamer.data.language import embed, encode_batches, mean_pool, perplexity, token_windows
from gossamer.data.models import load_model, load_tokenizer, normalise
from gossamer.data.registry import Asset, asset, assets
from gossamer.data.store import cache_dir, cached, fetch, remove, verify
from gossamer.data.text import LabelledTexts, TextSet, movie_reviews, trec, wikitext2

__all__ = [
    "Asset",
    "ImageSet",
    "LabelledImages",
    "LabelledTexts",
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
    "load_model",
    "load_tokenizer",
    "mean_pool",
    "mnist",
    "movie_reviews",
    "normalise",
    "perplexity",
    "remove",
    "token_windows",
    "trec",
    "verify",
    "wikitext2",
]
