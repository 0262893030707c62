"""Runs of a sweep on Ray: on this machine, or on a cluster that is there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import need
from ..recipes.grid import Job

if TYPE_CHECKING:
    from .pace import Pace

LOOK, SAVING = 1.0, 60.0  # seconds between looks, and for stopped runs to save their step


@dataclass(frozen=True)
class Done:
    """A run that is over; `error` says what stopped it."""

    name: str
    error: str = ""


def on_ray(
    jobs: Sequence[Job], run: Callable[[Job], Done], pace: Pace, workers: int, threads: int, address: str
) -> Generator[Done, None, None]:
    """Train the jobs on Ray's workers, and yield each when it is over. Ctrl-C lets all runs save their step first.

    Args:
        run: job → what came of it; it is sent to the workers.
        address: of a cluster; "" starts one for this call on this machine, with `workers` places.

    Raises:
        MissingDependency: Ray is not installed; install the extra "sweep".
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    ray = need("ray", "sweep")
    own = {"address": "local", "num_cpus": workers * threads, "include_dashboard": False}
    ray.init(**({"address": address} if address else own), log_to_driver=False, logging_level="error")
    waiting: dict[Any, str] = {}
    try:
        waiting = _submitted(ray, jobs, run, threads)
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=LOOK)
            for ref in ready:
                yield _result(ray, ref, waiting.pop(ref))
            pace.look()
    except BaseException:
        _stop(ray, waiting)
        raise
    finally:
        ray.shutdown()


def _submitted(ray: Any, jobs: Sequence[Job], run: Callable[[Job], Done], threads: int) -> dict[Any, str]:
    """All jobs, each after the one that it starts from; a worker that dies is replaced, and its run goes on."""
    refs: dict[str, Any] = {}
    for job in jobs:
        gpus = 1 if job.plan.device.startswith("cuda") else 0
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=2)(_after)
        refs[job.name] = remote.remote(refs.get(job.after), run, job)
    return {ref: name for name, ref in refs.items()}


def _after(first: Done | None, run: Callable[[Job], Done], job: Job) -> Done:
    if first is not None and first.error:
        return Done(job.name, f"{first.name}, which it starts from, failed")
    return run(job)


def _result(ray: Any, ref: object, name: str) -> Done:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:  # the worker died, again and again
        return Done(name, f"{type(error).__name__}: {error}")


def _stop(ray: Any, waiting: dict[Any, str]) -> None:
    """As Ctrl-C does in one process: every run saves its step."""
    for ref in waiting:
        ray.cancel(ref, force=False)
    if waiting:
        ray.wait(list(waiting), num_returns=len(waiting), timeout=SAVING)
