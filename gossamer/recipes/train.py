"""train: one run of a built-in task, dense or sparse, that may be stopped at any moment and goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ..core.errors import FileDamaged, TargetError
from ..core.files import whole_file
from .patient import patient
from .plan import Plan
from .trained import RUN, WEIGHTS, TrainedRun, read_trained, write_trained
from .training import Training

if TYPE_CHECKING:
    from ..data.tasks import Task

PLAN, CHECKPOINT, CURVE = "plan.json", "checkpoint.pt", "metrics.jsonl"
DRAFTS = tuple(f".{name}." for name in (PLAN, CHECKPOINT, CURVE, WEIGHTS, RUN))
Progress = Callable[[str, int, int], None]


def train(task: Task, plan: Plan, folder: str | Path, *, progress: Progress | None = None) -> TrainedRun:
    """Train a network as planned, and leave its weights, its record and its learning curve in `folder`.

    A run that was stopped (Ctrl-C, kill -9, a power cut) goes on from its last checkpoint when it is called again, and
    ends with the same weights bit for bit. A finished one is read back. Ctrl-C finishes the step and saves first.

    Args:
        folder: model.safetensors, run.json, metrics.jsonl; made if missing.
        progress: called with (loss and density in words, step, steps).

    Raises:
        TargetError: the folder holds a run with another plan, or the method cannot be attached.
        NonFiniteError: the loss is not finite any more; lower the rate.
        FileDamaged: a checkpoint cannot be read.
    """
    folder = Path(folder)
    _sweep(folder)
    refuse_other(folder, plan)
    if (folder / RUN).exists():
        return read_trained(folder)
    run = Training(task, plan)
    with whole_file(folder / PLAN) as draft:  # written now: a plan that cannot begin leaves nothing in the way
        draft.write_text(json.dumps(plan.to_dict(), indent=1))
    if (folder / CHECKPOINT).exists():
        run.load(_read(folder / CHECKPOINT))
        run.interruptions += 1
    _write_curve(folder, run.curve)
    with patient() as stopped:
        while run.step < plan.steps:
            run.advance()
            _tell(run, folder, progress)
            if run.step % plan.save_every == 0 or stopped():
                _save(folder / CHECKPOINT, run.state())
            if stopped():
                raise KeyboardInterrupt
    return _finish(run, folder)


def _sweep(folder: Path) -> None:
    """Remove what a killed writer left."""
    for draft in _entries(folder, drafts=True):
        draft.unlink(missing_ok=True)


def _entries(folder: Path, *, drafts: bool) -> list[Path]:
    """What a killed writer left half-written, or all the rest."""
    return [p for p in folder.glob("*") if p.name.startswith(DRAFTS) == drafts]


def refuse_other(folder: Path, plan: Plan) -> None:
    """A folder belongs to one plan.

    Raises:
        TargetError: it holds a run with another one, or files of something else.
    """
    asked, file = json.loads(json.dumps(plan.to_dict())), folder / PLAN
    if not file.exists():
        if _entries(folder, drafts=False):
            raise TargetError(f"{folder} holds files of something else; choose another folder")
        return
    try:
        held = json.loads(file.read_bytes())
    except ValueError as error:
        raise FileDamaged(f"{file} cannot be read ({error}); delete {folder} to start anew") from error
    for key in sorted({*asked, *held}):
        if asked.get(key) != held.get(key):
            raise TargetError(
                f"{folder} holds a run with {key} = {held.get(key)!r}, now it is {asked.get(key)!r}; choose another "
                "folder, or delete that one"
            )


def _tell(run: Training, folder: Path, progress: Progress | None) -> None:
    if run.curve and run.curve[-1][0] == run.step:
        with (folder / CURVE).open("a") as file:
            file.write(_line(run.curve[-1]))
    if progress is not None:
        progress(f"loss {run.loss:.4f}  density {run.density:.3f}", run.step, run.plan.steps)


def _line(point: tuple[int, float, float]) -> str:
    return json.dumps(dict(zip(("step", "loss", "density"), point))) + "\n"


def _write_curve(folder: Path, curve: list[tuple[int, float, float]]) -> None:
    """A run that goes on repeats the steps after its checkpoint: their lines go."""
    with whole_file(folder / CURVE) as draft:
        draft.write_text("".join(map(_line, curve)))


def _save(file: Path, state: Mapping[str, object]) -> None:
    with whole_file(file) as draft:
        torch.save(dict(state), draft)


def _read(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:  # torch raises what its reader meets: zip, pickle, key and type errors
        raise FileDamaged(f"{file} cannot be read ({error}); delete it to start this run anew") from error


def _finish(run: Training, folder: Path) -> TrainedRun:
    """The record is written last: a run that has one is over."""
    _save(folder / CHECKPOINT, run.state())
    record = run.close()
    with whole_file(folder / WEIGHTS) as draft:
        save_file({n: x.contiguous() for n, x in run.model.state_dict().items()}, draft)
    write_trained(record, folder / RUN)
    (folder / CHECKPOINT).unlink()
    return record
