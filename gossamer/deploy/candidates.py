"""Candidates: the formats and backends that could run one layer, by default or as the user named them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.errors import FormatError, unknown
from ..formats import FORMATS, Format, format_named
from ..kernels.dispatch import BACKENDS
from .structure import Structure, support_of

# Below this fraction of zeros a sparse product would have to beat the dense one on nearly all of its work.
FEWEST_ZEROS = 0.10
MOST_DECODE_TOKENS = 8
_SPEC = re.compile(r"^(?P<format>\w+)(?:\((?P<options>[\w=, ]*)\))?(?:/(?P<backend>\w+))?$")


@dataclass(frozen=True)
class Candidate:
    """One way to store and run a layer.

    Args:
        format: a format's name.
        options: the format's own options, such as (("g", 4),).
        backend: which backend multiplies it.
    """

    format: str
    options: tuple[tuple[str, int], ...]
    backend: str

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.options)
        return f"{self.format}({inner})/{self.backend}" if inner else f"{self.format}/{self.backend}"

    def build(self, w_MK: Tensor) -> Format:
        """Store a dense weight's non-zero entries."""
        return format_named(self.format).from_dense(w_MK, support_of(w_MK), **dict(self.options))


TORCH_DENSE = Candidate("dense", (), "dense")
ONEDNN_DENSE = Candidate("dense", (), "onednn")
DENSE = (TORCH_DENSE, ONEDNN_DENSE)


def automatic(
    density: float,
    structures: Sequence[Structure],
    fewest_tokens: int,
    dense: tuple[Candidate, ...] = DENSE,
) -> tuple[Candidate, ...]:
    """Everything worth measuring: the dense ways, and the sparse formats that the zeros fit."""
    if 1.0 - density < FEWEST_ZEROS:
        return dense
    sparse = [Candidate(s.format, s.options, "cpu") for s in structures]
    sparse.append(Candidate("csr", (), "cpu"))
    if fewest_tokens <= MOST_DECODE_TOKENS:
        sparse.append(Candidate("tilebitmask", (), "cpu"))
    return (*dense, *sparse)


def named(specs: Iterable[str], structures: Sequence[Structure]) -> tuple[Candidate, ...]:
    """The candidates a user named: "csr", "csr/cpu", "rowgrouped(g=8)/cpu", "dense/onednn".

    A format without options takes those of the structure that was found, or its own defaults.

    Raises:
        UnknownName: no such format or backend; near names are listed.
        FormatError: the string cannot be read.
    """
    return tuple(c for spec in specs for c in _read(spec, structures))


def _read(spec: str, structures: Sequence[Structure]) -> list[Candidate]:
    found = _SPEC.match(spec.strip())
    if found is None:
        raise FormatError(f"candidate {spec!r} cannot be read; write format, format/backend or format(g=4)/backend")
    name, backend = found["format"], found["backend"]
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    if backend is not None and backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    options = _options(spec, name, found["options"], structures)
    backends = [backend] if backend else (["dense", "onednn"] if name == "dense" else ["cpu"])
    return [Candidate(name, options, b) for b in backends]


def _options(spec: str, name: str, written: str | None, structures: Sequence[Structure]) -> tuple[tuple[str, int], ...]:
    if written is None:
        return next((s.options for s in structures if s.format == name), ())
    pairs = [part.split("=") for part in written.replace(" ", "").split(",") if part]
    known = set(format_named(name).OPTIONS) - {"rows", "cols"}
    for pair in pairs:
        if len(pair) != 2 or not pair[1].isdigit() or pair[0] not in known:
            raise FormatError(
                f"candidate {spec!r}: {'='.join(pair)!r} is not an option of {name}; "
                f"it has {', '.join(sorted(known)) or 'none'}, each a whole number"
            )
    return tuple((k, int(v)) for k, v in pairs)
