"""gossamer bench: time a model as it is, and a packed one beside the dense engines that can run its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .pack import whole_numbers
from .screen import Json, Report, bar, emit, waiting

if TYPE_CHECKING:
    from torch import nn

    from ..deploy.engines import Speed
    from .models import Loaded

OURS, LAYERS = "gossamer", "gossamer, layer by layer"


@dataclass(frozen=True)
class Line:
    """One engine at one thread count.

    Args:
        ms, iqr: median and distance between the quartiles of one call. Unit: ms.
        per_second: tokens or pictures.
        speedup: over the fastest dense fp32 engine at the same threads.
        precision: that it computes in; an engine that rounds is shown, and is no yardstick.
    """

    engine: str
    threads: int
    ms: float
    iqr: float
    per_second: float
    speedup: float = 1.0
    note: str = ""
    precision: str = "fp32"


def bench(
    model: Annotated[str, typer.Argument(help="A model or a packed model: folder, packaged asset, or hub id.")],
    threads: Annotated[str, typer.Option(help="Thread counts, such as 1,2.")] = "1,2",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per text.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Texts or pictures per call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; engines take turns within each.")] = 15,
    engines: Annotated[bool, typer.Option("--engines", help="Beside all dense engines here; takes minutes.")] = False,
    as_json: Json = False,
) -> None:
    """Time a model; a packed one beside the same weights run densely by torch.

    Engines take turns in every round, so that a busy machine is unfair to none; medians are shown. With --engines,
    onnxruntime and OpenVINO run the same dense weights too, each engine in a process of its own.

    Example: gossamer bench small-packed --threads 1,2
    """
    from . import models

    counts = whole_numbers(threads, "--threads")
    with waiting(f"loading {model}"):
        loaded = models.load(model)
        inputs = models.example(loaded, tokens=tokens, batch=batch)
        ways = _ways(loaded)
    measure = _beside_engines if engines else _by_turns
    work = batch * (tokens if loaded.tokenizer is not None or isinstance(inputs, Mapping) else 1)
    unit = "tokens/s" if isinstance(inputs, Mapping) else "pictures/s"
    with bar("timing") as progress:
        lines = measure(ways, inputs, counts, repeats, work, progress)
    record = {"model": model, "tokens": tokens, "batch": batch, "unit": unit, "lines": [asdict(n) for n in lines]}
    notes = dict.fromkeys(f"{line.engine}: {line.note}" for line in lines if line.note)
    emit(as_json, record, _table(lines, unit, model), *notes)


def _ways(loaded: Loaded) -> dict[str, nn.Module]:
    """Engines by name; the packed model first, where it is one: as one network, and as its modules call each other."""
    from ..deploy import unpack
    from ..deploy.layers import packed_layers

    if not packed_layers(loaded.model):
        return {"torch": loaded.model}
    return {OURS: loaded.model, LAYERS: loaded.model, "torch": unpack(loaded.model)}


def _compiled(ways: Ways, inputs: Inputs) -> tuple[dict[str, nn.Module], str]:
    """The packed model followed as one network; left out, with the reason, where it cannot be."""
    from ..core.errors import GossamerError
    from ..runtime.compiled import compile

    if OURS not in ways:
        return dict(ways), ""
    try:
        return {**ways, OURS: compile(ways[OURS], inputs, remeasure=True)}, ""
    except GossamerError as error:
        return {name: model for name, model in ways.items() if name != OURS}, str(error)


Ways = "Mapping[str, nn.Module]"
Inputs = "Mapping[str, Tensor] | Tensor"


def _by_turns(
    ways: Ways, inputs: Inputs, counts: Sequence[int], repeats: int, work: int, progress: Report
) -> list[Line]:
    """In this process, one thread count after the other."""
    ways, reason = _compiled(ways, inputs)
    lines = [Line(OURS, count, 0.0, 0.0, 0.0, 0.0, reason) for count in counts if reason]
    for done, count in enumerate(counts, 1):
        lines += _at(ways, inputs, count, repeats, work)
        progress(f"{count} threads", done, len(counts))
    return lines


def _beside_engines(
    ways: Ways, inputs: Inputs, counts: Sequence[int], repeats: int, work: int, progress: Report
) -> list[Line]:
    """Each engine in a process of its own, the best dense fp32 one to be set against."""
    from ..deploy.engines import measure_engines

    packed, whole = ({n: ways[n] for n in (name,) if n in ways} for name in (LAYERS, OURS))
    speeds = measure_engines(
        ways["torch"], inputs, packed=packed, whole=whole, threads=counts, seconds_each=0.2 * repeats, progress=progress
    )
    dense = [s for s in speeds if s.engine not in (OURS, LAYERS) and s.batch_ms and _precision(s.engine) == "fp32"]
    best = {count: min((s.batch_ms for s in dense if s.threads == count), default=0.0) for count in counts}
    per_item = work / speeds[0].batch
    return [
        Line(
            s.engine,
            s.threads,
            s.batch_ms or 0.0,
            s.batch_iqr or 0.0,
            per_item * (s.throughput or 0.0),
            best[s.threads] / s.batch_ms if s.batch_ms else 0.0,
            s.note or _beside_rounding(s, speeds),
            _precision(s.engine),
        )
        for s in sorted(speeds, key=lambda s: s.threads)
    ]


def _beside_rounding(ours: Speed, speeds: Sequence[Speed]) -> str:
    """Our row says how it stands to an engine that rounds, too, where that one was measured."""
    same = [s for s in speeds if s.threads == ours.threads and s.batch_ms and _precision(s.engine) != "fp32"]
    if ours.engine not in (OURS, LAYERS) or not ours.batch_ms or not same:
        return ""
    best = min(same, key=lambda s: s.batch_ms)
    return f"{best.batch_ms / ours.batch_ms:.2f}× the speed of {best.engine}, which rounds ({ours.threads} threads)"


def _precision(engine: str) -> str:
    return "bf16" if engine.endswith("bf16") else "fp32"


def _at(ways: Ways, inputs: Inputs, threads: int, repeats: int, work: int) -> list[Line]:
    from ..deploy.examples import call
    from ..deploy.timing import in_turn, median, torch_threads

    with torch_threads(threads):
        times = in_turn({n: lambda m=m: call(m, inputs) for n, m in ways.items()}, repeats)
    taken = {name: median(found) for name, found in times.items()}
    best = taken["torch"].ms
    return [Line(name, threads, t.ms, t.spread, 1e3 * work / t.ms, best / t.ms) for name, t in taken.items()]


def _table(lines: list[Line], unit: str, model: str) -> Table:
    drawn = Table(title=model, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    drawn.add_column("engine", no_wrap=True)
    for name in ("threads", "median", "quartiles apart", unit, "vs best fp32 dense"):
        drawn.add_column(name, justify="right")
    for line in lines:
        news = "green" if line.speedup > 1.03 else "red" if line.speedup < 0.97 else ""
        numbers = (f"{line.ms:.2f} ms", f"{line.iqr:.2f}", f"{line.per_second:,.0f}")
        if line.ms:
            drawn.add_row(line.engine, str(line.threads), *numbers, Text(f"{line.speedup:.2f}×", news))
        else:
            drawn.add_row(line.engine, str(line.threads), "could not run", "", "", "", style="dim")
    return drawn
