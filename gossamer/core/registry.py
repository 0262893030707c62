"""The registry: every method under its name, once. README's table, the API page and the law tests are made from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from .errors import UnknownName, near, unknown
from .sparsifier import Sparsifier

Build = Callable[..., Sparsifier]


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        name: what users call it.
        build: the function that returns its Sparsifier.
        paper: "arXiv:…" or a citation.
        site: what it makes sparse: "weight".
        row: its row in the method book, such as "P036", or "".
    """

    name: str
    build: Build
    paper: str
    site: str
    row: str = ""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.build) or "").split("\n")[0]

    @property
    def needs_density_alone(self) -> bool:
        """True if it can be built from a density and nothing else."""
        own = inspect.signature(self.build).parameters.values()
        return any(p.name == "density" for p in own) and all(p.default is not p.empty for p in own)

    def __call__(self, **options: object) -> Sparsifier:
        """Build the sparsifier, refusing options that the method does not have.

        Raises:
            UnknownName: an option is not one of the method's; the message lists near names.
        """
        known = inspect.signature(self.build).parameters
        for option in options:
            if option not in known:
                raise UnknownName(f"method {self.name!r} has no option {option!r}; {near(option, known)}")
        return self.build(**options)


_METHODS: dict[str, Method] = {}


def method(name: str, *, paper: str, site: str = "weight", row: str = "") -> Callable[[Build], Build]:
    """Register a function that builds a Sparsifier. Registering a name twice raises."""

    def register(build: Build) -> Build:
        if name in _METHODS:
            raise UnknownName(
                f"method {name!r} is registered already, by {_METHODS[name].build.__module__}; pick another"
            )
        _METHODS[name] = Method(name, build, paper, site, row)
        return build

    return register


def methods() -> dict[str, Method]:
    """Every registered method by name, sorted."""
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        UnknownName: there is none; the message lists near names.
    """
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    return _METHODS[name]
