"""The registry: every method under its name, once. README's table, the API page and the law tests are made from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import TargetError, UnknownName, near, unknown

# What a site's methods build: "weight" a Sparsifier, "delta" an Adapter (a room above knows that one).
Build = Callable[..., Any]
VERBS = {
    "weight": "gossamer.prune or gossamer.attach",
    "delta": "gossamer.adapt",
    "attention": "its build(...).on(model)",
}


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        name: what users call it.
        build: the function that returns its Sparsifier, or its Adapter.
        paper: "arXiv:…" or a citation.
        site: what it makes sparse: "weight", "delta", the change of a frozen weight, or "attention".
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

    def __call__(self, **options: object) -> Any:
        """Build the sparsifier or adapter, refusing options that the method does not have.

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
    """Register a function that builds what its site takes, see `Method`. Registering a name twice raises."""

    def register(build: Build) -> Build:
        if name in _METHODS:
            raise UnknownName(
                f"method {name!r} is registered already, by {_METHODS[name].build.__module__}; pick another"
            )
        _METHODS[name] = Method(name, build, paper, site, row)
        return build

    return register


def methods(site: str | None = "weight") -> dict[str, Method]:
    """Registered methods of one site by name, sorted; of every site if None."""
    return {name: m for name, m in sorted(_METHODS.items()) if site in (None, m.site)}


def get_method(name: str, site: str | None = "weight") -> Method:
    """The method called `name`.

    Args:
        site: what it must make sparse; None = anything.

    Raises:
        UnknownName: there is none; the message lists near names.
        TargetError: it is of another site; the message names the call it belongs to.
    """
    if name not in _METHODS:
        raise unknown("method", name, methods(site))
    found = _METHODS[name]
    if site not in (None, found.site):
        raise TargetError(
            f"method {name!r} is of site {found.site!r}, which this call cannot use; call {VERBS.get(found.site)}"
        )
    return found
