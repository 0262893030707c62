"""gossamer slice: a transformer in, a narrower dense one out, resumable at every half of a block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..core.files import whole_folder
from .folders import WORK, check_out, claim, clear
from .screen import Json, bar, emit, waiting

if TYPE_CHECKING:
    from ..recipes.slicing import SliceReport

REPORT = "gossamer-slice.json"


def slice(
    model: Annotated[str, typer.Argument(help="Folder, packaged asset (see 'gossamer assets'), or hub id.")],
    data: Annotated[str, typer.Option(help="Calibration text: a file, asset:wikitext2, asset:movie-reviews.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new unless --overwrite.")],
    keep: Annotated[float | None, typer.Option(help="Fraction of the width to keep, up to 1; 0.75.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: as few columns per place as hold this fraction of its squares.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration texts or windows.")] = 32,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens per window, or where a text is cut; 512.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Calibration texts at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the draw of calibration texts.")] = 0,
    workdir: Annotated[Path | None, typer.Option(help="Where the bases found wait; OUT/.work, removed.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Delete rows and columns of a transformer; what is left is smaller, dense, and faster anywhere.

    Writes what gossamer.load reads; 'gossamer bench OUT' times it. A run that was killed goes on with the bases that it
    had found when the same command is given again.

    Example: gossamer slice smollm2-135m --keep 0.75 --data asset:wikitext2 --out narrow
    """
    from .. import save
    from .. import slice as slice_model
    from . import calibration, models

    check_out(out, overwrite)
    how = {"samples": samples, "length": length, "batch": batch, "seed": seed}
    job = {"model": model, "keep": keep, "energy": energy, "data": data, **how}
    workdir = workdir or out / WORK
    claim(workdir, job)
    with waiting(f"loading {model}"):
        loaded = models.load(model)
        batches = calibration.batches(loaded, data, **how)
    with bar("slicing") as progress:
        report = slice_model(loaded.model, keep=keep, energy=energy, data=batches, workdir=workdir, progress=progress)
    record = {"out": str(out), "job": job, **report.to_dict()}
    with waiting(f"writing {out}"), whole_folder(out) as draft:
        save(loaded.model, draft, tokenizer=loaded.tokenizer)
        (draft / REPORT).write_text(json.dumps(record, indent=1))
    clear(workdir)
    emit(as_json, record, *(() if as_json else _summary(report, out)))


def _summary(report: SliceReport, out: Path) -> tuple[Table | str, ...]:
    drawn = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    least = min(report.places, key=lambda p: p.energy)
    rows = {
        "width": f"{report.width_before} → {_widths(report)} ({report.keep:.1%} kept)",
        "parameters": f"{report.parameters_before / 1e6:.1f} → {report.parameters / 1e6:.1f} million",
        "multiplications": f"{report.products_before / 1e6:.1f} → {report.products / 1e6:.1f} million per token",
        "energy kept": f"{least.energy:.2%} at least, in {least.name}",
        "time": f"{report.seconds:.1f} s for {report.tokens} tokens"
        + (f", {report.resumed} of {len(report.places)} bases from the earlier run" if report.resumed else ""),
        "saved": f"{out} (load it with gossamer.load; it is dense)",
    }
    for name, value in rows.items():
        drawn.add_row(name, value)
    return (drawn,)


def _widths(report: SliceReport) -> str:
    narrowest = min(p.width for p in report.places)
    return f"{report.width}" if narrowest == report.width else f"{narrowest} to {report.width}"
