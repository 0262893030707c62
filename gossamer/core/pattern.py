"""The pattern language: a string names every axis of a tensor and gives each one a role.

    o [i]                 bare = repeat: each row `o` is a pool of its own, its entries `i` compete
    (o {4}) [i]           braces = tied: four neighbouring rows share one fate
    o (g [4])             parentheses split one axis into factors; 2:4 keeps two of each four
    [...]                 an ellipsis stands for all axes not named

Shape suffixes: R pools (repeat), C competitors, T tied entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import PatternError, near

_TOKEN = re.compile(r"\s*(\.\.\.|[A-Za-z_]\w*|\d+|[()\[\]{}])")
_ROLE = {"[": "compete", "{": "tied"}
_CLOSE = {"[": "]", "{": "}", "(": ")"}
_ORDER = ("repeat", "compete", "tied")
_COLUMNS = ("compete", "repeat", "tied")
FEW = 8  # competitors that are ranked pair by pair


@dataclass(frozen=True)
class Axis:
    """One elementary axis: its name, its role, and the size the pattern fixes (None = taken from the tensor)."""

    name: str
    role: str
    size: int | None


@dataclass(frozen=True)
class Placed:
    """An axis laid on a tensor: which dimension it came from and how long it is."""

    role: str
    dim: int
    length: int


def _tokens(expr: str) -> list[str]:
    found, at = [], 0
    while at < len(expr.rstrip()):
        match = _TOKEN.match(expr, at)
        if match is None:
            raise PatternError(
                f"pattern {expr!r}: cannot read {expr[at:].strip()[0]!r}; use names, sizes, ( ) [ ] {{ }} and ..."
            )
        found.append(match.group(1))
        at = match.end()
    return found


@lru_cache(maxsize=512)
def _parse(expr: str) -> tuple[tuple[Axis, ...], ...]:
    """`expr` → one tuple of axes per tensor dimension; the ellipsis is a lone axis named '...'."""
    dims: list[list[Axis]] = []
    inside: list[Axis] | None = None
    opened: list[str] = []
    names: set[str] = set()
    for token in _tokens(expr):
        if token in _CLOSE:
            _check_open(expr, token, opened)
            opened.append(token)
            if token == "(":
                inside = []
        elif token in _CLOSE.values():
            if not opened or _CLOSE[opened[-1]] != token:
                raise PatternError(f"pattern {expr!r}: {token!r} closes nothing; check the order of the brackets")
            opened.pop()
            if token == ")":
                if not inside:
                    raise PatternError(f"pattern {expr!r}: an empty ( ) names no axis; write its factors inside")
                dims.append(inside)
                inside = None
        else:
            if token in names and not token.isdigit():
                raise PatternError(f"pattern {expr!r}: axis {token!r} appears twice; give every axis its own name")
            if token == "..." and inside is not None:
                raise PatternError(f"pattern {expr!r}: '...' stands for whole axes; move it out of the ( )")
            names.add(token)
            role = next((_ROLE[o] for o in reversed(opened) if o in _ROLE), "repeat")
            axis = Axis(token, role, int(token) if token.isdigit() else None)
            if inside is None:
                dims.append([axis])
            else:
                inside.append(axis)
    if opened:
        raise PatternError(f"pattern {expr!r}: {opened[-1]!r} is never closed; add {_CLOSE[opened[-1]]!r}")
    if not dims:
        raise PatternError("a pattern needs at least one axis; for a matrix try '[o i]' or the name 'unstructured'")
    return tuple(tuple(d) for d in dims)


def _check_open(expr: str, token: str, opened: list[str]) -> None:
    if token == "(" and "(" in opened:
        raise PatternError(f"pattern {expr!r}: ( ) inside ( ); split an axis once, with all its factors side by side")
    if token in _ROLE and any(o in _ROLE for o in opened):
        raise PatternError(
            f"pattern {expr!r}: {token!r} inside {opened[-1]!r}; an axis has one role, so close it first"
        )


@dataclass(frozen=True, init=False)
class Pattern:
    """Who competes with whom, and who shares a fate.

    Args:
        expr: axes in order; bare = repeat (a pool of its own), [compete], {tied}, (a b) = factors of one axis,
            an integer = an unnamed axis of that size, '...' = every axis not named.
        kept: winners per pool where the pattern's name fixes it (2 for "2:4"), else None.
        sizes: lengths of named factors, such as m=4.

    Example:
        >>> Pattern("o (g [m])", m=4).pools((8, 16))
        (32, 4, 1)

    Raises:
        PatternError: the string cannot be read, or names a size for an axis it does not have.
    """

    expr: str
    kept: int | None
    sizes: tuple[tuple[str, int], ...]

    def __init__(self, expr: str, kept: int | None = None, **sizes: int) -> None:
        object.__setattr__(self, "expr", expr)
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "sizes", tuple(sorted(sizes.items())))
        names = {axis.name for dim in _parse(expr) for axis in dim}
        for name, size in sizes.items():
            if name not in names:
                raise PatternError(f"pattern {expr!r} has no axis {name!r}; {near(name, names)}")
            if size < 1:
                raise PatternError(f"pattern {expr!r}: size {name}={size} must be at least 1")

    def __str__(self) -> str:
        known = " ".join(f"{n}={s}" for n, s in self.sizes)
        keep = f"keep {self.kept}" if self.kept is not None else ""
        return ", ".join(part for part in (self.expr, known, keep) if part)

    def place(self, shape: Sequence[int]) -> list[Placed]:
        """Lay the axes on a tensor's shape.

        Raises:
            PatternError: the number of axes differs, or an axis is not a multiple of its block; pad or skip it.
        """
        dims = _spread(self.expr, _parse(self.expr), len(shape), tuple(shape))
        known, placed = dict(self.sizes), []
        for d, (axes, length) in enumerate(zip(dims, shape)):
            sizes = [known.get(a.name, a.size) for a in axes]
            placed += [Placed(a.role, d, n) for a, n in zip(axes, self._lengths(axes, sizes, length, d))]
        return placed

    def _lengths(self, axes: Sequence[Axis], sizes: list[int | None], length: int, dim: int) -> list[int]:
        free = [a.name for a, s in zip(axes, sizes) if s is None]
        block = math.prod(s for s in sizes if s is not None)
        if len(free) > 1:
            raise PatternError(f"pattern {self.expr!r}: give a size for all but one of {free}, such as {free[-1]}=4")
        if length % block or (not free and length != block):
            raise PatternError(
                f"pattern {self.expr!r}: axis {dim} has length {length}, not a multiple of {block}; "
                "pad it, change the block size, or skip this layer"
            )
        return [length // block if s is None else s for s in sizes]

    def pools(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(number of pools R, competitors in each C, entries tied to one decision T)."""
        return _layout(self.expr, self.sizes, tuple(shape))[4]

    @property
    def pool_size(self) -> int | None:
        """Competitors per pool where the pattern alone fixes them (4 for "2:4"), else None."""
        known = dict(self.sizes)
        sizes = [known.get(a.name, a.size) for dim in _parse(self.expr) for a in dim if a.role == "compete"]
        return None if None in sizes else math.prod(s for s in sizes if s is not None)

    def split(self, x: Tensor) -> Tensor:
        """x of any shape the pattern names → x_RCT. Law: `merge(split(x)[..., 0], x.shape) == x` if nothing is tied."""
        lengths, order, columns, _, (r, c, t) = _layout(self.expr, self.sizes, tuple(x.shape))
        if c > FEW:
            return x.reshape(lengths).permute(order).reshape(r, c, t)
        # To be ranked pair by pair, the first competitors of all pools lie side by side, then all second ones ...
        return x.reshape(lengths).permute(columns).reshape(c, r, t).transpose(0, 1)

    def merge(self, u_RC: Tensor, shape: Sequence[int]) -> Tensor:
        """u_RC → `shape`, copying each decision over its tied axes."""
        lengths, order, _, back, pools = _layout(self.expr, self.sizes, tuple(shape))
        full = u_RC.unsqueeze(-1).expand(pools).reshape([lengths[i] for i in order])
        return full.permute(back).reshape(tuple(shape))


Axes = tuple[int, ...]
Layout = tuple[Axes, Axes, Axes, Axes, tuple[int, int, int]]


def _layout(expr: str, sizes: tuple[tuple[str, int], ...], shape: tuple[int, ...]) -> Layout:
    """String work that torch.compile cannot trace, and need not."""
    return _cached_layout(expr, sizes, shape)


# All that torch.compiler.assume_constant_result does; calling it would import torch._dynamo, which takes a second.
_layout._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _cached_layout(expr: str, sizes: tuple[tuple[str, int], ...], shape: tuple[int, ...]) -> Layout:
    """Axis lengths, the permutations to [repeat, compete, tied] and to [compete, repeat, tied], the one back from the
    first, and (R, C, T)."""
    placed = Pattern(expr, **dict(sizes)).place(shape)
    order, columns = _order(placed, _ORDER), _order(placed, _COLUMNS)
    back = sorted(range(len(order)), key=order.__getitem__)
    r, c, t = (math.prod(p.length for p in placed if p.role == role) for role in _ORDER)
    return tuple(p.length for p in placed), tuple(order), tuple(columns), tuple(back), (r, c, t)


def _order(placed: Sequence[Placed], roles: Sequence[str]) -> list[int]:
    return [i for role in roles for i, p in enumerate(placed) if p.role == role]


def _spread(expr: str, dims: tuple[tuple[Axis, ...], ...], rank: int, shape: tuple[int, ...]) -> list[tuple[Axis, ...]]:
    """Replace the ellipsis by as many axes as the tensor has left."""
    at = next((i for i, d in enumerate(dims) if d[0].name == "..."), None)
    extra = rank - (len(dims) - (at is not None))
    if extra < 0 or (at is None and extra):
        raise PatternError(
            f"pattern {expr!r} names {len(dims) - (at is not None)} axes, but the tensor has shape {shape}"
        )
    if at is None:
        return list(dims)
    filler = [(Axis(f"...{j}", dims[at][0].role, None),) for j in range(extra)]
    return [*dims[:at], *filler, *dims[at + 1 :]]


ALIASES = {
    "unstructured": "[...]",
    "row": "o [...]",
    "filter": "[o] {...}",
    "channel": "{o} [i] {...}",
    "kernel": "[o i] {...}",
}
_NM = re.compile(r"^(\d+):(\d+)$")
_VNM = re.compile(r"^(\d+):(\d+):(\d+)$")
_ROWS = re.compile(r"^(\d+)-row$")
_BLOCK = re.compile(r"^(\d+)x(\d+)$")


def pattern(spec: str | Pattern) -> Pattern:
    """Read a pattern from its name or its expression.

    Names: "unstructured", "row" (each output row its own pool), "filter", "channel", "kernel", "N:M" (N KEPT of
    each M inputs, as "2:4"), "V:N:M" (the same choice for V rows), "G-row" (rows in groups of G share a support),
    "AxB" (blocks). Anything else is read as an expression.

    Example:
        >>> pattern("2:4")
        Pattern(expr='o (g [4]) ...', kept=2, sizes=())

    Raises:
        PatternError: neither a name nor a readable expression; the message lists near names.
    """
    if isinstance(spec, Pattern):
        return spec
    text = spec.strip()
    if text in ALIASES:
        return Pattern(ALIASES[text])
    if found := _NM.match(text):
        return _n_of_m("o", *map(int, found.groups()), name=text)
    if found := _VNM.match(text):
        v, n, m = map(int, found.groups())
        return _n_of_m(f"(o {{{_positive(v, text)}}})", n, m, name=text)
    if found := _ROWS.match(text):
        return Pattern(f"(o {{{_positive(int(found[1]), text)}}}) [...]")
    if found := _BLOCK.match(text):
        a, b = (_positive(int(n), text) for n in found.groups())
        return Pattern(f"([o] {{{a}}}) ([i] {{{b}}}) ...")
    if re.fullmatch(r"[\w:-]+", text):  # a lone word is a mistyped name, not a one-axis pattern
        known = [*ALIASES, "2:4", "1:4", "4:8", "64:2:8", "2-row", "4-row", "4x4", "4x8"]
        raise PatternError(f"no pattern is called {spec!r}; {near(text, known)} (or write one, such as 'o [i]')")
    return Pattern(text)


def _n_of_m(rows: str, n: int, m: int, *, name: str) -> Pattern:
    if not 0 < n <= m:
        raise PatternError(f"pattern {name!r}: N:M keeps N of every M, so 0 < N <= M; for 50 % write '2:4'")
    return Pattern(f"{rows} (g [{m}]) ...", kept=n)


def _positive(n: int, name: str) -> int:
    if n < 1:
        raise PatternError(f"pattern {name!r}: sizes start at 1")
    return n


def units(scores: Tensor, pattern: Pattern) -> Tensor:
    """Scores of whatever is decided together: sums over the tied axes, u_RC. Half types are summed in float32."""
    s_RCT = pattern.split(scores)
    s_RCT = s_RCT.float() if s_RCT.dtype in (torch.float16, torch.bfloat16) else s_RCT
    return s_RCT.squeeze(-1) if s_RCT.shape[-1] == 1 else s_RCT.sum(-1)
