"""gossamer warmup: compile the kernels once, so that no first call has to wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from .screen import Json, bar, emit

if TYPE_CHECKING:
    from ..kernels.warm import Warmed

Kinds = Annotated[
    list[str] | None,
    typer.Argument(
        help="products, networks, images, bfloat16, decode, int4, training, spgemm; all when none is named."
    ),
]


def warmup(kinds: Kinds = None, as_json: Json = False) -> None:
    """Compile the kernels for common patterns and types, once per machine; what is compiled already is only read.

    Example: gossamer warmup products networks
    """
    from ..kernels import warm_up
    from ..kernels.cpu.cache import kernel_dir

    with bar("warming up") as progress:
        done = warm_up(*(kinds or ()), progress=progress)
    folder = str(kernel_dir())
    record = {"folder": folder, "kernels": [asdict(one) for one in done], **_counts(done)}
    emit(as_json, record, *(() if as_json else (_table(done), _verdict(done, folder))))


def _counts(done: Sequence[Warmed]) -> dict[str, object]:
    ready = [one for one in done if one.refused is None]
    return {
        "compiled": sum(not one.from_disk for one in ready),
        "from_disk": sum(one.from_disk for one in ready),
        "refused": len(done) - len(ready),
        "seconds": sum(one.seconds for one in done),
    }


def _table(done: Sequence[Warmed]) -> Table:
    """One line per kind; refusals in words."""
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("kind", "compiled", "from disk", "seconds", "cannot run here"):
        drawn.add_column(name, justify="left" if name in ("kind", "cannot run here") else "right", overflow="fold")
    for kind in dict.fromkeys(one.kind for one in done):
        these = [one for one in done if one.kind == kind]
        counts = _counts(these)
        why = "; ".join(dict.fromkeys(one.refused for one in these if one.refused))
        drawn.add_row(kind, str(counts["compiled"]), str(counts["from_disk"]), f"{counts['seconds']:.1f}", why)
    return drawn


def _verdict(done: Sequence[Warmed], folder: str) -> str:
    counts = _counts(done)
    ready = counts["compiled"] + counts["from_disk"]  # type: ignore[operator]
    return f"{ready} kernels are ready, {counts['compiled']} of them compiled just now, kept in {folder}"
