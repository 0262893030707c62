"""gossamer cache: compiled kernels, measured times and assets on disk: where they lie, how much they are, cleared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .screen import Json, emit

app = typer.Typer(help="Compiled kernels, measured times and assets on disk: where, how much, and cleared.")

Names = Annotated[list[str] | None, typer.Argument(help="kernels, tunings; both when none is named.")]


@app.callback(invoke_without_command=True)
def _default(ctx: typer.Context, as_json: Json = False) -> None:
    if ctx.invoked_subcommand is None:
        show(as_json)


@app.command("list")
def show(as_json: Json = False) -> None:
    """Where each cache lies, how many entries it has, and its size."""
    from ..data import assets, cache_dir, cached
    from ..kernels.caches import caches

    records = [{"name": c.name, "folder": str(c.folder), "entries": c.entries, "bytes": c.nbytes} for c in caches()]
    kept = cache_dir()
    here = sum(cached(a.name) for a in assets())
    records.append({"name": "assets", "folder": str(kept), "entries": here, "bytes": _bytes_under(kept)})
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1), caption="gossamer cache clear [kernels|tunings]")
    for column in ("cache", "entries", "MB", "folder"):
        drawn.add_column(column, justify="right" if column in ("entries", "MB") else "left", overflow="fold")
    for r in records:
        drawn.add_row(str(r["name"]), str(r["entries"]), f"{int(r['bytes']) / 1e6:.1f}", str(r["folder"]))
    emit(as_json, records, drawn)


def _bytes_under(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@app.command("clear")
def clear(names: Names = None, as_json: Json = False) -> None:
    """Delete compiled kernels, measured times, or both; assets have 'gossamer assets remove'."""
    from ..kernels.caches import cache_named, caches

    chosen = [cache_named(name) for name in names] if names else list(caches())
    freed = {cache.name: cache.clear() for cache in chosen}
    emit(as_json, freed, *(f"{name}: {nbytes / 1e6:.1f} MB freed" for name, nbytes in freed.items()))
