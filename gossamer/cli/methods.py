"""gossamer methods: the table of methods, and the page of one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .screen import Json, emit

if TYPE_CHECKING:
    from ..core import Method


def methods(
    name: Annotated[str, typer.Argument(help="Show the page of this method.")] = "",
    as_json: Json = False,
) -> None:
    """List the methods, or explain one.

    Example: gossamer methods sparsegpt
    """
    from .. import get_method
    from ..core import methods as registered

    if name:
        found = get_method(name, site=None)
        emit(as_json, _record(found), *(() if as_json else (_page(found),)))
        return
    known = list(registered(site=None).values())
    emit(as_json, [_record(m) for m in known], *(() if as_json else (_table(known),)))


def required(found: Method) -> list[str]:
    """Options that have no default; a one-shot method has none."""
    parameters = inspect.signature(found.build).parameters
    return [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def needs(found: Method) -> list[str]:
    """Statistics of a layer's input that the method asks for; none for methods that train."""
    return [] if required(found) else list(found().needs)


def _record(found: Method) -> dict[str, object]:
    parameters = inspect.signature(found.build).parameters
    return {
        "name": found.name,
        "summary": found.summary,
        "paper": found.paper,
        "site": found.site,
        "needs": needs(found),
        "required_options": required(found),
        "options": {n: p.default for n, p in parameters.items() if p.default is not p.empty},
        "doc": inspect.getdoc(found.build) or "",
    }


def _table(known: list[Method]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("method", "what it does", "needs data", "paper"):
        drawn.add_column(column, overflow="fold")
    for m in known:
        drawn.add_row(Text(m.name, "bold"), m.summary, "yes" if needs(m) else "no", m.paper)
    return drawn


def _page(found: Method) -> Panel:
    options = ", ".join(str(p) for p in inspect.signature(found.build).parameters.values())
    body = f"{inspect.getdoc(found.build) or ''}\n\nOptions: {options}\nPaper: {found.paper}"
    return Panel(Text(body), title=found.name, title_align="left", expand=False)
