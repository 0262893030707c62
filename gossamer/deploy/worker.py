"""worker: one engine at one number of threads in a process of its own, so that thread pools never meet.

`python -m gossamer.deploy.worker spec.json` prepares the engine, checks it, answers {"ready": ...} and then, for
every line {"case": name, "seconds": s} on its input, runs that case for s seconds and answers with the times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

FEWEST_RUNS = 3


def main(spec_file: str) -> int:
    """Serve one parent until its pipe closes. Errors are answered, not printed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the pipe carries answers only
    spec = json.loads(Path(spec_file).read_text())
    try:
        cases, ready = _prepare(spec)
    except Exception as error:  # whatever an engine raises belongs in the parent's table
        _say(answers, {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
        return 1
    _say(answers, {"ready": ready})
    for line in sys.stdin:
        order = json.loads(line)
        _say(answers, {"times": _times(cases[order["case"]], order["seconds"])})
    return 0


def _prepare(spec: dict) -> tuple[dict[str, Callable[[], object]], dict[str, object]]:
    from safetensors.numpy import load_file

    from .runners import runner

    if spec["kind"] == "torch" or ":" in spec["kind"]:
        _warm_imports(spec)
    cases, worst, before, grown = {}, 0.0, resident_bytes(), None
    bind_of: dict[str, Callable] = {}
    for name, case in spec["cases"].items():
        if case["model"] not in bind_of:
            bind_of[case["model"]] = runner(spec["kind"], case["model"], spec["threads"])
        run = bind_of[case["model"]](load_file(case["inputs"]))
        worst = max(worst, _difference(run(), load_file(case["wanted"])))
        cases[name] = run
        # Engines hold a copy per exported shape; one of them is what a user would hold.
        grown = resident_bytes() - before if grown is None else grown
    if not worst <= spec["tolerance"]:
        raise ValueError(f"results are off torch's by {worst:.2g} of the largest value")
    return cases, {"difference": worst, "rss": grown}


def _warm_imports(spec: dict) -> None:
    """Libraries are not the model's memory: bring them in before it is counted."""
    from .load import read_record
    from .skeleton import build

    record = read_record(next(iter(spec["cases"].values()))["model"])
    build(record["skeleton"])


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _difference(got: list, wanted: dict) -> float:
    """Largest difference relative to the largest wanted value, over outputs in order."""
    import numpy as np

    worst = 0.0
    for i, have in enumerate(got):
        want = wanted[f"output_{i:03d}"]
        if have.shape != want.shape:
            return float("inf")
        scale = max(float(np.abs(want).max(initial=0.0)), 1e-30)
        off = float(np.abs(have.astype(np.float64) - want).max(initial=0.0)) / scale
        worst = max(worst, off if off == off else float("inf"))
    return worst if len(got) == len(wanted) else float("inf")


def _times(run: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of single runs, for about that long and at least three of them, after one to warm up."""
    run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < FEWEST_RUNS or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def _say(answers: TextIO, message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
