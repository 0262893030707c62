"""Matrices to multiply: graphs and data taken from real texts and pictures, and seeded synthetic ones, named so."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
from scipy import sparse

from gossamer.data.images import mnist
from gossamer.data.text import movie_reviews, wikitext2

_WORD = re.compile(r"[a-z0-9]+")


def _csr(values, rows, columns, shape) -> sparse.csr_array:
    """float32 CSR with int32 indices, sorted, without duplicates."""
    made = sparse.coo_array((np.asarray(values, np.float32), (rows, columns)), shape=shape).tocsr()
    made.sum_duplicates()
    return _narrow(made)


def _narrow(a) -> sparse.csr_array:
    """int32 indices, which every library takes: nobody pays for converting."""
    return sparse.csr_array((a.data, a.indices.astype(np.int32), a.indptr.astype(np.int32)), shape=a.shape)


@cache
def _numbered(texts: tuple[str, ...]) -> tuple[list[np.ndarray], int]:
    """Each text as numbers of its words, in order, and how many different words there are."""
    numbers: dict[str, int] = {}
    return [np.array([numbers.setdefault(w, len(numbers)) for w in _WORD.findall(t.lower())]) for t in texts], len(
        numbers
    )


def word_graph() -> sparse.csr_array:
    """Which word follows which in the validation part of WikiText-2, how often on a logarithmic scale."""
    (words,), count = _numbered((wikitext2("valid"),))
    graph = _csr(np.ones(len(words) - 1), words[:-1], words[1:], (count, count))
    graph.data = np.log1p(graph.data)
    return graph


def tfidf() -> sparse.csr_array:
    """4,000 Rotten Tomatoes reviews by words, tf-idf, rows of length one."""
    texts, count = _numbered(movie_reviews("rotten_tomatoes").train.texts[:4000])
    rows = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
    a = _csr(np.ones(len(rows)), rows, np.concatenate(texts), (len(texts), count))
    a.data *= np.log(len(texts) / np.bincount(a.indices, minlength=count)).astype(np.float32)[a.indices]
    norm = np.sqrt(np.maximum(np.asarray(a.multiply(a).sum(1)).ravel(), 1e-12))
    a.data /= np.repeat(norm, np.diff(a.indptr)).astype(np.float32)
    return a


def digits() -> sparse.csr_array:
    """1,000 MNIST digits by pixels."""
    pictures = mnist().test.images[:1000].reshape(1000, -1)
    return _narrow(sparse.csr_array(np.asarray(pictures, np.float32)))


def rmat(scale: int = 14, degree: int = 8) -> sparse.csr_array:
    """A synthetic R-MAT graph with the customary probabilities .57, .19, .19, .05."""
    draw, edges = np.random.default_rng(0), degree << scale
    ends = np.zeros((2, edges), np.int64)
    for _ in range(scale):
        quarter = draw.choice(4, edges, p=(0.57, 0.19, 0.19, 0.05))
        ends = 2 * ends + np.stack([quarter >> 1, quarter & 1])
    return _csr(draw.standard_normal(edges), *ends, (1 << scale, 1 << scale))


def band(size: int = 50_000, half: int = 5) -> sparse.csr_array:
    """A synthetic band matrix: 2 x half + 1 diagonals of normal numbers."""
    draw, offsets = np.random.default_rng(0), range(-half, half + 1)
    diagonals = [draw.standard_normal(size - abs(k)).astype(np.float32) for k in offsets]
    return _narrow(sparse.diags_array(diagonals, offsets=list(offsets), format="csr"))


def grid(side: int = 300) -> sparse.csr_array:
    """The five-point Laplacian of a square grid: synthetic values, the pattern of real discretisations."""
    line = sparse.diags_array([-np.ones(side - 1), 2 * np.ones(side), -np.ones(side - 1)], offsets=[-1, 0, 1])
    return _narrow(sparse.csr_array(sparse.kronsum(line, line)).astype(np.float32))


def lower(graph: sparse.csr_array) -> sparse.csr_array:
    """Ones where a graph, made undirected, has an edge to an earlier node: what triangles are counted with."""
    both = sparse.coo_array(graph + graph.T)
    below = both.coords[0] > both.coords[1]
    # Nodes in descending order of degree number from the end, so that rows of hubs stay short.
    order = np.argsort(np.argsort(-np.bincount(both.coords[0], minlength=both.shape[0]), kind="stable"))
    ends = np.sort(np.stack([order[c[below]] for c in both.coords]), axis=0)
    return _csr(np.ones(ends.shape[1]), ends[1], ends[0], both.shape)


def _square(make: Callable) -> Callable:
    return lambda: (make(), make())


def _gram(make: Callable) -> Callable:
    def factors():
        a = make()
        return a, _narrow(a.T.tocsr())

    return factors


# Name -> (what it is, the factors).
PRODUCTS = {
    "words": ("real", _square(word_graph)),
    "reviews": ("real", _gram(tfidf)),
    "terms": ("real", lambda: _gram(tfidf)()[::-1]),
    "digits": ("real", _gram(digits)),
    "rmat": ("synthetic", _square(rmat)),
    "band": ("synthetic", _square(band)),
    "grid": ("synthetic", _square(grid)),
}
TRIANGLES = {"words-triangles": ("real", word_graph), "rmat-triangles": ("synthetic", rmat)}
