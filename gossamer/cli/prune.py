"""gossamer prune: a dense model in, a sparse one of the same shape out, resumable at every layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..core.errors import CalibrationError, GossamerError
from ..core.files import whole_folder
from . import recipe as recipes
from .folders import WORK, check_out, claim, clear
from .screen import Json, bar, emit, waiting
from .stages import stages

if TYPE_CHECKING:
    from ..core import Sparsifier
    from ..recipes.prune import PruneReport
    from .models import Loaded
    from .recipe import Recipe

REPORT = "gossamer-prune.json"


def prune(
    model: Annotated[str, typer.Argument(help="Folder, packaged asset (see 'gossamer assets'), or hub id.")] = "",
    method: Annotated[str, typer.Option(help="Name of a method; 'gossamer methods' lists them.")] = "",
    sparsity: Annotated[float | None, typer.Option(help="Fraction of zeros, 0 to 1.")] = None,
    density: Annotated[float | None, typer.Option(help="Fraction kept, 0 to 1: the same said the other way.")] = None,
    pattern: Annotated[str, typer.Option(help="Name or expression: 2:4, 4-row, unstructured, 'o [i]' ...")] = "",
    regroup: Annotated[
        bool, typer.Option("--regroup", help="4-row, 2-row ...: choose which rows share zeros.")
    ] = False,
    sequential: Annotated[
        str, typer.Option(help="layer or block: what is still dense while its inputs are measured; the method's own.")
    ] = "",
    reconstruct: Annotated[
        int | None,
        typer.Option(help="Epochs in which each pruned block is trained back to the dense one; 0, 3 is good."),
    ] = None,
    data: Annotated[str, typer.Option(help="Calibration text: a file, asset:wikitext2, asset:movie-reviews.")] = "",
    samples: Annotated[int | None, typer.Option(help="Calibration texts or windows; 128.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window, or where a text is cut; 512.")] = None,
    batch: Annotated[int | None, typer.Option(help="Calibration texts at once; 8.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw of calibration texts; 0.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Only layers of this name pattern; repeatable.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave these layers dense; repeatable.")] = None,
    unreached: Annotated[
        str, typer.Option(help="Layers that no text reaches: dense (as they are) or magnitude; dense.")
    ] = "",
    on_disk: Annotated[
        bool, typer.Option("--on-disk", help="MODEL is a folder larger than memory: one block is loaded at a time.")
    ] = False,
    spool: Annotated[str, typer.Option(help="Folder where calibration's activations wait on disk; in memory.")] = "",
    allocation: Annotated[
        str, typer.Option(help="Density per layer: uniform, er, erk, or sensitivity (needs --data).")
    ] = "",
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for the method; repeatable.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file with the same keys; flags win over it.")] = None,
    workdir: Annotated[str, typer.Option(help="Where finished layers wait; OUT/.work, removed at the end.")] = "",
    out: Annotated[str, typer.Option(help="Folder to write; must be new unless --overwrite.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Make a model sparse, in one pass, with or without calibration data.

    Writes plain dense weights with zeros in them, which transformers loads as ever; 'gossamer pack' then makes the
    zeros pay. A run that was killed goes on from its last finished layer when the same command is given again. A recipe
    with recover:, evaluate: or pack: is done as one job, ending in OUT/report.html, and goes on at any stage.

    Example: gossamer prune minilm --method wanda --density 0.2 --pattern 4-row --data asset:movie-reviews --out small
    """
    held = recipes.read(recipe) if recipe else {}
    flags = {
        **{"model": model, "method": method, "sparsity": sparsity, "density": density, "pattern": pattern},
        **{"regroup": regroup or None, "sequential": sequential, "reconstruct": reconstruct},
        **{"data": data, "samples": samples, "length": length, "batch": batch, "seed": seed},
        **{"targets": tuple(targets or ()), "skip": tuple(skip or ()), "allocation": allocation},
        **{"unreached": unreached, "on_disk": on_disk or None, "spool": spool},
        **{"workdir": workdir, "out": out, "options": recipes.options(option or ())},
    }
    asked = _complete(recipes.merge(held, flags))
    sparsifier = _sparsifier(asked)
    if (more := stages(held)) is not None:
        from .job import job

        if asked.on_disk:
            raise GossamerError(
                "recover:, evaluate: and pack: load the whole model; leave them out, or leave on_disk out"
            )
        job(asked, more, sparsifier, overwrite=overwrite, as_json=as_json)
        return
    check_out(Path(asked.out), overwrite)
    report, resumed = run(asked, sparsifier)
    emit(as_json, _record(asked, report, resumed), *(() if as_json else _summary(asked, report, resumed)))


def _complete(asked: Recipe) -> Recipe:
    for name, flag in (("model", "MODEL"), ("method", "--method"), ("out", "--out")):
        if not getattr(asked, name):
            raise typer.BadParameter(f"give {flag}, here or in a recipe", param_hint=flag)
    return replace(asked, workdir=asked.workdir or str(Path(asked.out) / WORK))


def _sparsifier(asked: Recipe) -> Sparsifier:
    """Everything about the method that can be refused is refused before the model is loaded."""
    from .. import get_method
    from ..core import OneShot
    from .methods import required

    if asked.density is not None and asked.sparsity is not None:
        raise GossamerError("density and sparsity say the same thing; give one of the two")
    density = asked.density if asked.sparsity is None else 1.0 - asked.sparsity
    given = {"density": density, "pattern": asked.pattern}
    found = get_method(asked.method)
    if missing := [name for name in required(found) if name not in asked.options]:
        raise GossamerError(f"method {asked.method!r} needs {', '.join(missing)}; give --option {missing[0]}=...")
    sparsifier = found(**{k: v for k, v in given.items() if v is not None}, **asked.options)
    if not isinstance(sparsifier.policy, OneShot):
        raise GossamerError(
            f"method {asked.method!r} prunes while a model trains; use gossamer.attach in your training loop, "
            "or take a one-shot method here"
        )
    if _reads(asked, sparsifier) and not asked.data:
        raise CalibrationError(
            f"{_reader(asked, sparsifier)} by their inputs; give --data TEXTFILE or --data asset:wikitext2"
        )
    return sparsifier


def _reads(asked: Recipe, sparsifier: Sparsifier) -> bool:
    from ..recipes.allocate import MEASURED

    return bool(sparsifier.needs or asked.reconstruct) or asked.allocation in MEASURED


def _reader(asked: Recipe, sparsifier: Sparsifier) -> str:
    if sparsifier.needs:
        return f"method {asked.method!r} scores weights"
    return "reconstruction trains blocks" if asked.reconstruct else f"allocation {asked.allocation!r} measures layers"


def run(asked: Recipe, sparsifier: Sparsifier) -> tuple[PruneReport, int]:
    """Load, prune and save; the report, and how many layers an earlier run had finished."""
    from ..recipes.prune import prune as prune_model
    from ..recipes.reconstruct import Reconstruct
    from . import calibration, models

    workdir = Path(str(asked.workdir))
    claim(workdir, asked.job)
    with waiting(f"loading {asked.model}"):
        loaded = models.load_on_disk(asked.model) if asked.on_disk else models.load(asked.model)
        how = {"samples": asked.samples, "length": asked.length, "batch": asked.batch, "seed": asked.seed}
        data = calibration.batches(loaded, asked.data, **how) if asked.data and _reads(asked, sparsifier) else None
    with bar(f"pruning with {asked.method}") as progress:
        report = prune_model(
            loaded.model,
            sparsifier,
            data=data,
            targets=asked.targets,
            skip=asked.skip,
            unreached=asked.unreached,
            spool=asked.spool,
            regroup=asked.regroup,
            sequential=asked.sequential,
            reconstruct=Reconstruct(epochs=asked.reconstruct) if asked.reconstruct else None,
            allocation=asked.allocation,
            workdir=workdir,
            progress=progress,
        )
    resumed = sum(layer.resumed for layer in report.layers)
    with waiting(f"writing {asked.out}"):
        _save(loaded, Path(asked.out), report, _record(asked, report, resumed))
    clear(workdir)
    return report, resumed


def _save(loaded: Loaded, out: Path, report: PruneReport, record: dict[str, object]) -> None:
    """All or nothing; the default work folder lies in `out` and goes when it is replaced."""
    from ..attach.shelf import shelf_of
    from ..deploy import save
    from ..integrations.pretrained import save_pretrained
    from .models import quiet

    if (shelf := shelf_of(loaded.model)) is not None:
        shelf.save(out, {REPORT: json.dumps(record, indent=1)})
        return
    with whole_folder(out) as draft:
        if hasattr(loaded.model, "save_pretrained"):
            with quiet():
                save_pretrained(loaded.model, draft, tokenizer=loaded.tokenizer, report=report)
        else:
            save(loaded.model, draft)
        (draft / REPORT).write_text(json.dumps(record, indent=1))


def _record(asked: Recipe, report: PruneReport, resumed: int) -> dict[str, object]:
    return {"out": asked.out, "job": asked.job, "resumed_layers": resumed, "next": _next(asked), **report.to_dict()}


def _next(asked: Recipe) -> str:
    return f"gossamer pack {asked.out} --out {asked.out.rstrip('/')}-packed"


def _summary(asked: Recipe, report: PruneReport, resumed: int) -> tuple[Table | str, ...]:
    drawn = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "method": f"{report.method}, pattern {report.pattern}",
        "layers": f"{len(report.layers)} pruned"
        + (f", {resumed} of them taken from the earlier run" if resumed else ""),
        "zeros": f"{1 - report.density:.2%} of their weights",
        "time": f"{report.seconds:.1f} s",
        "saved": f"{asked.out} (dense weights with zeros: transformers loads it as ever)",
    }
    for name, value in rows.items():
        drawn.add_row(name, value)
    left = [f"left dense: {name} ({reason})" for name, reason in report.skipped[:8]]
    left += [f"note: {r.name}: {r.note}" for r in [r for r in report.layers if r.note][:8]]
    more = [f"... and {len(report.skipped) - 8} more" if len(report.skipped) > 8 else ""]
    return (drawn, *left, *[m for m in more if m], f"\nMake it pay:  {_next(asked)}")
