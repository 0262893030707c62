"""One solver at one thread count in a process of its own. Needs numpy only; the solver brings the rest.

    python -m benchmarks.harness.worker --package benchmarks.stacks --solver torch_csr --threads 1
reads one JSON request per line and answers each with one line of JSON. Between lines it sleeps in `read`, so that no
pool of one engine disturbs another.

    {"case": "mlp-0.1", "seconds": 0.15, "files": "/folder", "output": "/file.npz"}
times the case; where "output" is given its result is also written there, for the parent to compare with the truth.
    {"forget": true} drops what was prepared.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np

from benchmarks.harness.contract import Prepared


class Worker:
    """Keeps what its solver prepared, case by case."""

    def __init__(self, package: str, solver: str, threads: int) -> None:
        self.package, self.threads, self.ready = package, threads, {}
        self.solver = import_module(f"{package}.solvers.{solver}")

    def answer(self, request: dict) -> dict:
        """Do what one line asks."""
        if request.get("forget"):
            self.ready.clear()
            gc.collect()
            return {"forgotten": True}
        prepared = self.prepared(request["case"], request["files"])
        reply = timed(prepared.run, request["seconds"])
        if request.get("output"):
            save(prepared.output(), request["output"])
            reply["measures"] = {k: float(v) for k, v in (prepared.measures or dict)().items()}
        return reply | {"resident_mb": resident_mb()}

    def prepared(self, case: str, files: str) -> Prepared:
        """The solver's function for a case."""
        if case not in self.ready:
            self.ready[case] = Prepared.of(self.solver.prepare(self.data(case, files), self.threads))
        return self.ready[case]

    def data(self, case: str, files: str) -> object:
        """What `build` returns; for solvers that read files the folder that `export` wrote."""
        if getattr(self.solver, "READS_FILES", False) or getattr(self.solver, "ENVIRONMENT", "main") != "main":
            return Path(files)
        problem = import_module(f"{self.package}.problem")
        return problem.build(next(c for c in problem.CASES if c.id == case))


def timed(run, seconds: float) -> dict:
    """Quartiles of single calls in milliseconds, after two to warm up."""
    run(), run()
    taken, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds or len(taken) < 5:
        start = time.perf_counter_ns()
        run()
        taken.append((time.perf_counter_ns() - start) / 1e6)
    low, middle, high = statistics.quantiles(taken, n=4)
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "calls": len(taken)}


def save(output: object, path: str) -> None:
    """One array or several, tensors or arrays, as .npz in float64 (integers stay integers)."""
    several = output if isinstance(output, tuple | list) else (output,)
    np.savez(path, *[array(x) for x in several])


def array(x: object) -> np.ndarray:
    """A tensor (of any type that has float()) or an array, on the host."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.double().numpy() if x.is_floating_point() else x.numpy()
    x = np.asarray(x)
    return x if x.dtype.kind in "iub" else x.astype(np.float64)


def resident_mb() -> float:
    """Peak resident memory of this process so far, MB (10^6 bytes); 0 where the system does not say."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((float(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmHWM")), 0.0)


def private_stdout():
    """The pipe to the parent, for replies alone: whatever an engine prints goes to the error stream instead."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", required=True)
    parser.add_argument("--solver", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    # torch calls its CSR tensors a beta at every start.
    warnings.filterwarnings("ignore", "Sparse CSR tensor support")
    replies, worker = private_stdout(), None
    for line in sys.stdin:
        try:
            worker = worker or Worker(options.package, options.solver, options.threads)
            reply = worker.answer(json.loads(line))
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
