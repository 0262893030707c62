"""gossamer doctor: what this machine can do, what it cannot and why; and whether two runs are compared fairly."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from ..report.machine import ABSENT, hardware, versions
from .codes import ENVIRONMENT
from .screen import Json, emit

# Beside the required libraries: what each optional one is for, and the extra that brings it.
OPTIONAL = {
    "transformers": ("language models", "text"),
    "gguf": ("SmolLM2, which comes as GGUF", "text"),
    "matplotlib": ("plots of reports", "report"),
    "jinja2": ("pages of reports", "report"),
    "scikit-learn": ("the probe of the demo", "demo"),
    "onnxruntime": ("a dense engine to compare with", "demo"),
    "openvino": ("a dense engine to compare with", "demo"),
}
REQUIRED = {"torch": "2.6", "numpy": "1.26", "numba": "0.61", "safetensors": "0.4", "greenlet": "3.0"}
KERNELS = ("spmm", "spmm_columns", "spmm_conv", "bitmask_float32", "bitmask_bfloat16", "int4groups")
ROOM_MB = 500
# Backends that need no compiled kernel.
FALLBACK = "backends dense, unpack and reference"


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Args:
        status: "ok", "note" (works, but less well) or "broken" (gossamer cannot do its job).
        advice: what to do about it.
    """

    what: str
    status: str
    found: str
    advice: str = ""


app = typer.Typer(help="Look over this machine, or over two training runs.")


@app.callback(invoke_without_command=True)
def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Look over this machine: libraries, threads, processor, kernels, caches, assets, disk.

    Ends with exit code 4 if something required is broken.
    """
    if ctx.invoked_subcommand is not None:
        return
    findings = list(examine())
    broken = [f for f in findings if f.status == "broken"]
    emit(as_json, {"ok": not broken, "findings": [asdict(f) for f in findings]}, _table(findings), _verdict(findings))
    if broken:
        raise typer.Exit(ENVIRONMENT)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a finished 'gossamer train', or its run.json.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    as_json: Json = False,
) -> None:
    """Are two training runs compared fairly? Nonzeros, FLOPs, cost, tuning, dense baseline, collapse, warm start.

    Example: gossamer doctor compare runs/rigl runs/dense
    """
    from ..recipes.trained import read_trained
    from ..report.fair import fairness

    runs = [read_trained(path) for path in (first, second)]
    answers = fairness(*runs)
    unfair = sum(a.verdict == "unfair" for a in answers)
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("", "question", "answer"):
        drawn.add_column(column, overflow="fold")
    for a in answers:
        drawn.add_row(Text(a.verdict, _COLOUR[a.verdict]), a.question, Text(a.said))
    record = {"fair": not unfair, "runs": [str(first), str(second)], "answers": [asdict(a) for a in answers]}
    names = "\n".join(f"{which}: {r.name}, {r.title}" for which, r in zip(("first", "second"), runs))
    verdict = (
        f"{unfair} of {len(answers)} questions speak against comparing the two as they are."
        if unfair
        else ("Nothing on record speaks against comparing the two.")
    )
    emit(as_json, record, names, drawn, verdict)


def examine() -> Iterator[Finding]:
    """Every check, in order; one that fails unexpectedly is itself a finding."""
    for check in (_python, _libraries, _threads, _processor, _kernels, _caches, _assets, _optional):
        yield from _guarded(check)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a doctor reports what it meets
        what = check.__name__.strip("_")
        yield Finding(what, "broken", f"{type(error).__name__}: {error}", "reinstall gossamer, or report this line")


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    advice = "" if good else "install Python 3.11 or later"
    yield Finding("python", "ok" if good else "broken", hardware()["system"], advice)


def _libraries() -> Iterator[Finding]:
    for name, got in versions(REQUIRED).items():
        least = REQUIRED[name]
        good = got != ABSENT and _parts(got) >= _parts(least)
        advice = "" if good else f"pip install '{name}>={least}'"
        yield Finding(name, "ok" if good else "broken", got, advice)


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:2])


def _threads() -> Iterator[Finding]:
    import torch

    from ..kernels.cpu.threads import runner_name

    usable = int(hardware()["cores"])
    used = torch.get_num_threads()
    good = used <= usable
    advice = "" if good else f"set OMP_NUM_THREADS={usable}: more threads than processors slow everything down"
    yield Finding("threads", "ok" if good else "note", f"torch uses {used} of {usable}; pool: {runner_name()}", advice)


def _processor() -> Iterator[Finding]:
    from ..kernels.cpu.target import cpu_name, features, lanes

    wide = [f for f in ("avx512f", "avx512vbmi2", "avx512bf16", "avx2", "fma", "neon") if f in features()]
    found = f"{cpu_name()}: {', '.join(wide) or 'no wide vectors'}; {lanes()} float32 lanes"
    advice = "" if lanes() >= 8 else "kernels run with narrow vectors; gains will be small"
    yield Finding("processor", "ok" if lanes() >= 8 else "note", found, advice)
    import torch

    cuda = torch.cuda.is_available()
    yield Finding("gpu", "ok", torch.cuda.get_device_name(0) if cuda else "none; the kernels are for processors")


def _kernels() -> Iterator[Finding]:
    from ..kernels.cpu.target import supports
    from ..kernels.cpu.trial import cannot_compile

    broken = cannot_compile()
    advice = f"reinstall numba; until then torch computes every product ({FALLBACK})" if broken else ""
    yield Finding("kernel compiler", "broken" if broken else "ok", broken or "a trial kernel runs", advice)
    for name in KERNELS:
        why = supports(name)
        advice = "" if why is None else "nothing to do: other kernels, or dense, serve instead"
        yield Finding(f"kernel {name}", "ok" if why is None else "note", why or "can run", advice)


def _caches() -> Iterator[Finding]:
    from ..data import cache_dir
    from ..kernels.caches import caches
    from ..kernels.cpu.cache import kernel_dir
    from ..kernels.tuning import SWITCH, enabled

    kernels, tunings = caches()
    for what, folder, cache, unit in (
        ("compiled kernels", kernel_dir(), kernels, "functions"),
        ("measured times", tunings.folder, tunings, "measurements"),
    ):
        found = f"{folder}: {cache.entries} {unit}, {cache.nbytes / 1e6:.1f} MB"
        yield _cache(what, folder, found, f"'gossamer cache clear {cache.name}' empties it")
    yield _cache("assets", cache_dir(), str(cache_dir()), "")
    if not enabled():
        advice = f"unset {SWITCH}: 'pack' and 'compile' measure the same layers in every process"
        yield Finding("measured times", "note", "not kept", advice)
    free = shutil.disk_usage(_existing(cache_dir())).free / 1e6
    advice = "" if free > ROOM_MB else f"the demos need about {ROOM_MB} MB; free some, or set GOSSAMER_CACHE_DIR"
    yield Finding("disk", "ok" if free > ROOM_MB else "note", f"{free / 1e3:.1f} GB free", advice)


def _cache(what: str, folder: Path, found: str, advice: str) -> Finding:
    good = _writable(folder)
    advice = advice if good else "set GOSSAMER_CACHE_DIR to a folder that can be written"
    return Finding(f"cache for {what}", "ok" if good else "broken", found, advice)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)):
            return True
    except OSError:
        return False


def _assets() -> Iterator[Finding]:
    from ..data import assets, cached

    here = [a.name for a in assets() if cached(a.name)]
    advice = "" if "minilm" in here else "nothing to do: 'gossamer demo' fetches what it needs"
    yield Finding("assets here", "ok", ", ".join(here) or "none yet", advice)


def _optional() -> Iterator[Finding]:
    for name, got in versions(OPTIONAL).items():
        purpose, extra = OPTIONAL[name]
        advice = f"for {purpose}: pip install 'gossamer[{extra}]'" if got == ABSENT else ""
        yield Finding(name, "note" if got == ABSENT else "ok", got, advice)


_COLOUR = {"ok": "green", "note": "yellow", "broken": "red", "fair": "green", "unknown": "yellow", "unfair": "red"}


def _table(findings: list[Finding]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("", "what", "found", "what to do"):
        drawn.add_column(column, overflow="fold")
    for f in findings:
        drawn.add_row(Text(f.status, _COLOUR[f.status]), f.what, Text(f.found), Text(f.advice))
    return drawn


def _verdict(findings: list[Finding]) -> str:
    broken, notes = (sum(f.status == s for f in findings) for s in ("broken", "note"))
    if broken:
        return f"{broken} broken: gossamer cannot do its job until the lines marked broken are mended."
    return f"All that is required is here{f'; {notes} notes' if notes else ''}."
