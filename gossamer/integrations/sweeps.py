"""sweep: many training runs of built-in tasks, in this process or on Ray's workers; stopped anyhow, it goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from ..core.errors import GossamerError
from ..core.files import locked
from ..data.tasks import task
from ..recipes.grid import RUNS, Job, grid
from ..recipes.train import Progress, refuse_other, train
from ..recipes.trained import RUN, read_trained
from ..report.sweep import Sweep, Trial, collected, write_sweep
from .pace import Pace, Status
from .ray_workers import Done, on_ray

Tell = Callable[[Status], None]


def sweep(
    asked: Mapping[str, object],
    out: str | Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    address: str = "",
    tell: Tell | None = None,
) -> Sweep:
    """Train every run of tasks × methods × densities × seeds, each in a folder of its own, and gather one table.

    A sweep that was stopped (Ctrl-C, kill -9, a power cut) goes on when it is called again: finished runs are read
    back, half-done ones go on from their last checkpoint, bit for bit. One that is asked for more, such as further
    seeds, trains what is missing. A run that fails is told in the result and tried again in the next call.

    Args:
        asked: the axes and the keys of all runs, see `gossamer.recipes.grid.grid`.
        out: folder: runs/TASK/METHOD-DENSITY-seedSEED as `gossamer train` leaves them, sweep.json and table.md.
        workers: runs at a time on this machine; as many as there are cores for unless given. 1 = in this process;
            more need Ray, of the extra "sweep".
        threads: of torch in each run; results may differ in the last bits between thread counts.
        address: of a Ray cluster whose machines share `out`; it then decides how many run at a time. "" = this machine.
        tell: called about once a second, and when a run is over, with what is done and how long the rest may take.

    Returns:
        The rows with means and 95 % intervals over seeds; also written to `out`.

    Raises:
        UnknownName, GossamerError: the axes or keys make no sense, before anything is trained.
        TargetError: `out` holds runs with other settings.
        MissingDependency: several workers, and Ray is not installed.
    """
    jobs, workers = grid(asked, out, task), _workers(workers, threads)
    folder = Path(out).absolute()
    for job in jobs:
        refuse_other(folder / RUNS / job.name, job.plan)
    pace = Pace(jobs, folder / RUNS, workers, tell)
    todo = [job for job in jobs if not pace.finished(job)]
    failures: dict[str, str] = {}
    run = partial(run_job, folder, threads=threads)
    way = on_ray(todo, run, pace, workers, threads, address) if address or workers > 1 else here(todo, run, pace)
    try:
        with closing(way):  # whatever ends the loop, the runs at work save their step before the table is written
            for done in way:
                if done.error:
                    failures[done.name] = done.error
                pace.over(done.name, done.error)
    finally:
        found = gathered(jobs, folder, failures)
        write_sweep(found, folder)
    return found


def _workers(asked: int | None, threads: int) -> int:
    if threads < 1 or (asked is not None and asked < 1):
        raise GossamerError(f"workers and threads are at least 1, got workers={asked}, threads={threads}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // threads, 1) if asked is None else asked


def run_job(folder: Path, job: Job, *, threads: int, progress: Progress | None = None) -> Done:
    """One run. Whatever goes wrong with it is told, so that the others go on.

    A lock keeps out a second sweep in the same folder, and a worker that outlives a killed one.
    """
    try:
        torch.set_num_threads(threads)
        place = folder / RUNS / job.name
        with locked(place.with_name(f".{place.name}.lock")):
            train(task(job.plan.task), job.plan, place, progress=progress)
    except GossamerError as error:
        return Done(job.name, str(error))
    except Exception as error:  # a night's other runs must not die of one
        return Done(job.name, f"{type(error).__name__}: {error}")
    return Done(job.name)


def here(jobs: Sequence[Job], run: Callable[..., Done], pace: Pace) -> Generator[Done, None, None]:
    """One after the other in this process."""
    before = torch.get_num_threads()
    try:
        for job in jobs:
            yield run(job, progress=lambda what, step, steps, name=job.name: pace.at(name, step))
    finally:
        torch.set_num_threads(before)


def gathered(jobs: Sequence[Job], folder: Path, failures: Mapping[str, str]) -> Sweep:
    """Read what is finished, and say what is not."""
    read = {j.name: read_trained(folder / RUNS / j.name) for j in jobs if (folder / RUNS / j.name / RUN).exists()}
    there = {j.name for j in jobs if j.name in read and (not j.after or j.after in read)}  # both parts are charged
    trials = [
        Trial(j.label, j.density, read[j.name], read[j.after] if j.after else None)
        for j in jobs
        if j.label and j.name in there
    ]
    missing = [j.name for j in jobs if j.name not in there and j.name not in failures]
    return collected(trials, failures, missing)
