"""gossamer bench: time a model as it is, and a packed one beside the dense engines that can run its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .pack import whole_numbers
from .screen import Json, bar, emit, waiting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .models import Loaded


@dataclass(frozen=True)
class Line:
    """One engine at one thread count.

    Args:
        ms, iqr: median and distance between the quartiles of one call. Unit: ms.
        per_second: tokens or pictures.
        speedup: over the fastest dense engine at the same threads.
    """

    engine: str
    threads: int
    ms: float
    iqr: float
    per_second: float
    dense: bool
    speedup: float = 1.0


def bench(
    model: Annotated[str, typer.Argument(help="A model or a packed model: folder, packaged asset, or hub id.")],
    threads: Annotated[str, typer.Option(help="Thread counts, such as 1,2.")] = "1,2",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per text.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Texts or pictures per call.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; engines take turns within each.")] = 15,
    as_json: Json = False,
) -> None:
    """Time a model; a packed one beside the same weights run densely by torch.

    Engines take turns in every round, so that a busy machine is unfair to none; medians are shown.

    Example: gossamer bench small-packed --threads 1,2
    """
    from . import models

    counts = whole_numbers(threads, "--threads")
    with waiting(f"loading {model}"):
        loaded = models.load(model)
        inputs = models.example(loaded, tokens=tokens, batch=batch)
        ways = _ways(loaded)
    work = batch * (tokens if loaded.tokenizer is not None or isinstance(inputs, Mapping) else 1)
    unit = "tokens/s" if isinstance(inputs, Mapping) else "pictures/s"
    lines = []
    with bar("timing") as progress:
        for done, count in enumerate(counts, 1):
            lines += _time(ways, inputs, count, repeats, work)
            progress(f"{count} threads", done, len(counts))
    record = {"model": model, "tokens": tokens, "batch": batch, "unit": unit, "lines": [asdict(n) for n in lines]}
    emit(as_json, record, _table(lines, unit, model))


def _ways(loaded: Loaded) -> dict[str, nn.Module]:
    """Engines by name; the packed model first, where it is one."""
    from ..deploy import unpack
    from ..deploy.layers import packed_layers

    if not packed_layers(loaded.model):
        return {"torch": loaded.model}
    return {"gossamer": loaded.model, "torch": unpack(loaded.model)}


def _time(
    ways: Mapping[str, nn.Module], inputs: Mapping[str, Tensor] | Tensor, threads: int, repeats: int, work: int
) -> list[Line]:
    from ..deploy.examples import call
    from ..deploy.timing import in_turn, torch_threads

    with torch_threads(threads):
        taken = in_turn({n: lambda m=m: call(m, inputs) for n, m in ways.items()}, repeats)
    best = min((t.ms for name, t in taken.items() if name != "gossamer"), default=None)
    return [
        Line(name, threads, t.ms, t.iqr, 1e3 * work / t.ms, name != "gossamer", best / t.ms if best else 1.0)
        for name, t in taken.items()
    ]


def _table(lines: list[Line], unit: str, model: str) -> Table:
    drawn = Table(title=model, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    drawn.add_column("engine")
    for name in ("threads", "median ms", "quartiles apart", unit, "vs best dense"):
        drawn.add_column(name, justify="right")
    for line in lines:
        news = "green" if line.speedup > 1.03 else "red" if line.speedup < 0.97 else ""
        numbers = (f"{line.ms:.2f}", f"{line.iqr:.2f}", f"{line.per_second:,.0f}")
        drawn.add_row(line.engine, str(line.threads), *numbers, Text(f"{line.speedup:.2f}×", news))
    return drawn
