"""gossamer assets: packaged models and sets, listed, fetched, hashed again, removed."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .screen import Json, bar, emit

app = typer.Typer(help="Packaged models and data sets: pinned by hash, cached, usable offline.")

Names = Annotated[list[str], typer.Argument(help="Names as 'gossamer assets list' shows them.")]


@app.callback(invoke_without_command=True)
def _default(ctx: typer.Context, as_json: Json = False) -> None:
    if ctx.invoked_subcommand is None:
        show(as_json)


@app.command("list")
def show(as_json: Json = False) -> None:
    """Every known asset and whether it is here."""
    from ..data import assets, cache_dir, cached

    known = [(a, cached(a.name)) for a in assets()]
    records = [
        {
            "name": a.name,
            "kind": a.kind,
            "description": a.description,
            "bytes": a.size,
            "download_bytes": a.archive.size,
            "package": f"{a.archive.source}:{a.archive.package}=={a.archive.version}",
            "licence": a.licence,
            "upstream_licence": a.upstream_licence,
            "cached": here,
        }
        for a, here in known
    ]
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1), caption=f"cache: {cache_dir()}")
    for column in ("asset", "kind", "here", "download", "what it is"):
        drawn.add_column(column, justify="right" if column == "download" else "left", overflow="fold")
    for a, here in known:
        mark = Text("yes", "green") if here else Text("no", "dim")
        drawn.add_row(Text(a.name, "bold"), a.kind, mark, f"{a.archive.size / 1e6:.1f} MB", a.description)
    emit(as_json, records, drawn)


@app.command()
def fetch(names: Names, as_json: Json = False) -> None:
    """Download assets with pip, apt-get or npm, check their hashes, and keep them."""
    from ..data import asset
    from ..data import fetch as fetch_one

    for name in names:  # a mistyped name is refused before anything is downloaded
        asset(name)
    places = {}
    for name in names:
        with bar(f"fetching {name}") as report:
            places[name] = str(fetch_one(name, progress=lambda done, total, report=report: report("", done, total)))
    emit(as_json, places, *(f"{name}: {place}" for name, place in places.items()))


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Names; all that are here by default.")] = None,
    as_json: Json = False,
) -> None:
    """Hash cached assets again; a file that was changed ends with exit code 4."""
    from ..data import assets, cached
    from ..data import verify as verify_one

    chosen = names or [a.name for a in assets() if cached(a.name)]
    places = {name: str(verify_one(name)) for name in chosen}
    emit(as_json, places, *([f"{name}: as pinned" for name in places] or ["no asset is here"]))


@app.command()
def remove(names: Names, as_json: Json = False) -> None:
    """Delete assets from the cache."""
    from ..data import asset
    from ..data import remove as remove_one

    for name in names:
        asset(name)
    removed = {name: remove_one(name) for name in names}
    emit(as_json, removed, *(f"{name}: {'removed' if was else 'was not here'}" for name, was in removed.items()))
