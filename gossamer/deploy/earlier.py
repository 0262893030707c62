"""Earlier: a layer's times from a run before this one on the same machine, instead of measuring again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from ..kernels.tuning import finite_ms, recall, remember
from .candidates import Candidate
from .measure import Measured, Work, measure
from .record import Trial

KIND = "pack"


def measured_or_recalled(
    look: object,
    work: Work,
    candidates: Sequence[Candidate],
    repeats: int,
    *,
    cold: bool = False,
    remeasure: bool = False,
) -> tuple[Measured, bool]:
    """The trials of one layer, and whether they were measured earlier.

    Only times on the CPU are kept: `tuning.machine` names no other device, and `timing` does not wait for one.

    Args:
        look: what layers that share a measurement have in common.
        work: as for `measure`.
        candidates: as for `measure`.
        repeats: as for `measure`; times of fewer rounds do not stand in for those of more.
        cold: as for `measure`.
        remeasure: measure in any case, and remember the new times.
    """
    if work.device.type != "cpu":
        return measure(work, candidates, repeats, cold=cold), False
    names = list(dict.fromkeys(map(str, candidates)))
    key = {
        "look": str(look),
        "candidates": names,
        "repeats": repeats,
        "cold": cold,
        "threads": torch.get_num_threads(),
    }
    found = None if remeasure else recall(KIND, key, lambda value: _read(value, names))
    if found is not None:
        return found, True
    measured = measure(work, candidates, repeats, cold=cold)
    remember(KIND, key, {"trials": [asdict(t) for t in measured.trials], "noise": measured.noise})
    return measured, False


def _read(value: Mapping, names: Sequence[str]) -> Measured:
    """Trials as they were written.

    Raises:
        KeyError, TypeError, ValueError: they are not what was written.
    """
    trials = tuple(Trial(**t) for t in value["trials"])
    if sorted(t.candidate for t in trials) != sorted(names):
        raise ValueError(f"trials of {[t.candidate for t in trials]}, asked for {names}")
    for trial in trials:
        if trial.refused is None:
            finite_ms(trial.ms), int(trial.nbytes)  # type: ignore[arg-type]
        elif trial.ms is not None:
            raise ValueError(f"{trial.candidate} is refused, and has a time")
    noise = {t.candidate: float(value["noise"][t.candidate]) for t in trials if t.refused is None}
    return Measured(trials, noise)
