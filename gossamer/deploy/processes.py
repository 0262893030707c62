"""processes: the parent's end of engines that run in processes of their own (`worker` is the other end)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Limit on starting, loading and checking one engine; a busy machine may need tens of seconds.
START_SECONDS = 180.0


class Worker:
    """The other end of a worker's pipe; the process starts when it is told to prepare."""

    def __init__(self, start: Callable[[], subprocess.Popen]) -> None:
        self.start, self.process = start, None

    def prepare(self) -> dict | str:
        """Start, prepare and check the engine: what it says of itself, or why it cannot run."""
        self.process = self.start()
        answer = self._read(START_SECONDS)
        return answer if isinstance(answer, str) else answer["ready"]

    def take_turn(self, seconds: float, times: dict[str, list[float]]) -> str | None:
        """Run every case for that long and add the milliseconds of single runs; the reason where the process died."""
        for case, taken in times.items():
            try:
                self.process.stdin.write(json.dumps({"case": case, "seconds": seconds}) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                return f"its process ended while it was timed (exit code {self.process.wait()})"
            answer = self._read(START_SECONDS + 10 * seconds)
            if isinstance(answer, str):
                return answer
            taken += answer["times"]
        return None

    def _read(self, limit: float) -> dict | str:
        timer = threading.Timer(limit, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            return f"its process ended without an answer (exit code {self.process.wait()}, limit {limit:.0f} s)"
        answer = json.loads(line)
        return answer.get("error", answer)


@contextmanager
def worker(spec: Path, threads: int) -> Iterator[Worker]:
    """A worker for one engine, as the file says; its process ends with the block."""
    count = str(threads)
    # Only one engine is at work at a time, so each may spin for a moment between its own calls, as it would alone.
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    environment.pop("OMP_WAIT_POLICY", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    found = Worker(
        lambda: subprocess.Popen(
            [sys.executable, "-m", "gossamer.deploy.worker", str(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )
    )
    try:
        yield found
    finally:
        if found.process is not None:
            _end(found.process)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.close()
