"""gossamer pack: per layer the format and kernel that measured fastest, saved so that two lines load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from ..core.errors import GossamerError
from .screen import Json, bar, emit, waiting

if TYPE_CHECKING:
    from ..deploy import PackedLayer, PackReport
    from .models import Loaded


def pack(
    model: Annotated[str, typer.Argument(help="A pruned model: folder, packaged asset, or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    tokens: Annotated[
        str, typer.Option(help="Tokens per call it is measured with; '128,1' = a prompt, then one.")
    ] = "128",
    batch: Annotated[int, typer.Option(min=1, help="Texts or pictures per call.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to measure with; torch's setting.")] = None,
    min_gain: Annotated[
        float, typer.Option(help="Go sparse only where it is this many times faster than dense.")
    ] = 1.0,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure also what this machine measured earlier.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Store each layer in the format, and run it on the kernel, that measured fastest on its own shape.

    Where the dense layer wins, it stays dense, and the table says so.

    Example: gossamer pack small --out small-packed --tokens 128
    """
    from .. import pack as pack_model
    from .. import save
    from ..deploy import report_of
    from . import models

    with waiting(f"loading {model}"):
        loaded = models.load(model)
    calls = [models.example(loaded, tokens=n, batch=batch) for n in whole_numbers(tokens, "--tokens")]
    with bar("measuring") as progress:
        packed = pack_model(
            loaded.model,
            calls,
            threads=threads,
            min_gain=min_gain,
            inplace=True,
            remeasure=remeasure,
            progress=progress,
        )
    report = report_of(packed)
    save(packed, out, tokenizer=loaded.tokenizer)
    record = {"out": str(out), "load_lines": load_lines(out, loaded), **report.to_dict()}
    emit(as_json, record, *(() if as_json else (_table(report), *_totals(report, out, loaded))))


def whole_numbers(text: str, flag: str) -> list[int]:
    """ "1,2" → [1, 2].

    Raises:
        GossamerError: anything but whole numbers from 1 on.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise GossamerError(f"{flag} needs whole numbers from 1 on, such as 1,2; got {text!r}")
    return [int(part) for part in parts]


def load_lines(out: Path, loaded: Loaded) -> list[str]:
    """The two lines that load a packed model and run it, as one may type them into a new session."""
    where = str(out)
    if loaded.tokenizer is not None:
        load = f"gossamer.load({where!r}), transformers.AutoTokenizer.from_pretrained({where!r})"
        run = 'print(model(**tokenizer("some text", return_tensors="pt"))[0].shape)'
        return [f"import gossamer, transformers; model, tokenizer = {load}", run]
    from .models import PICTURE

    words = getattr(loaded.config, "vocab_size", None)
    inputs = f"torch.rand(1, {', '.join(map(str, PICTURE))})" if words is None else "torch.tensor([[1, 2, 3]])"
    return [f"import gossamer, torch; model = gossamer.load({where!r})", f"print(model({inputs})[0].shape)"]


def _table(report: PackReport) -> Table:
    """One line for layers that differ by their block number only; --json has every layer."""
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("", justify="right", no_wrap=True)
    drawn.add_column("layers", overflow="fold", vertical="bottom")
    for name in ("shape", "kept", "best dense\nms", "chosen\nms", "gain"):
        drawn.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    drawn.add_column("runs as", no_wrap=True, vertical="bottom")
    drawn.add_column("measured", no_wrap=True, vertical="bottom")
    groups: dict[tuple[object, ...], list[PackedLayer]] = {}
    for layer in report.layers:
        kind = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", layer.name)
        groups.setdefault((kind, layer.shape, layer.format, layer.backend), []).append(layer)
    stems = {str(kind).partition("*.")[0] for kind, *_ in groups if "*." in str(kind)}
    for (kind, *_), layers in groups.items():
        name = str(kind).partition("*.")[2] if len(stems) == 1 else ""
        drawn.add_row(*_cells(name or str(kind), layers))
    return drawn


def _cells(kind: str, layers: Sequence[PackedLayer]) -> tuple[str | Text, ...]:
    """The block-wise name, and medians over its layers."""
    first, dense = layers[0], median(n.best_dense_ms for n in layers)
    gain = median(n.speedup for n in layers)
    pace = Text(f"{gain:.2f}×", "green" if gain > 1.03 else "")
    times = (f"{dense:.3f}", f"{median(n.ms for n in layers):.3f}")
    kept = f"{median(n.density for n in layers):.1%}"
    return (
        f"{len(layers)}×",
        kind,
        "×".join(map(str, first.shape)),
        kept,
        *times,
        pace,
        f"{first.format}/{first.backend}",
        "earlier" if all(n.measured_earlier for n in layers) else "now",
    )


def _totals(report: PackReport, out: Path, loaded: Loaded) -> tuple[str, ...]:
    reasons = Counter(layer.reason.removeprefix("dense: ") for layer in report.layers if not layer.sparse)
    earlier = sum(layer.measured_earlier for layer in report.layers)
    said = f"{earlier} of {len(report.layers)} layers were measured earlier; --remeasure measures anew"
    remembered = (said,) if earlier else ()
    return (
        *remembered,
        f"whole model: {report.model_ms_before:.2f} → {report.model_ms_after:.2f} ms ({report.speedup:.2f}×), "
        f"{report.threads} threads, memory {report.bytes_before / 1e6:.1f} → {report.bytes_after / 1e6:.1f} MB, "
        f"{report.bytes_on_disk / 1e6:.1f} MB on disk",
        *(f"{n} of {len(report.layers)} layers stay dense: {reason}" for reason, n in reasons.items()),
        *(f"not packed: {name} ({reason})" for name, reason in report.skipped[:8]),
        f"largest difference of the outputs: {report.difference:.1e} of the largest value",
        "\nLoad it and run it:",
        *(f"  {line}" for line in load_lines(out, loaded)),
    )
