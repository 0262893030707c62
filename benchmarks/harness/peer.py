"""The parent's end of a worker: ask, wait with patience, and start again after a crash."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import threading
from pathlib import Path

from .conventions import worker_environment
from .problem import ROOT


class Peer:
    """A solver's process at one thread count; starts at the first question."""

    def __init__(self, python: str | Path, package: str, solver: str, threads: int, *, patience: float) -> None:
        told = ("--package", package, "--solver", solver, "--threads", str(threads))
        self.command = [str(python), "-m", "benchmarks.harness.worker", *told]
        self.environment, self.patience = worker_environment(threads, str(ROOT)), patience
        self.process: subprocess.Popen | None = None
        self.replies: queue.Queue[str] = queue.Queue()

    def ask(self, request: dict) -> dict:
        """Send a request, wait for its answer: what was measured, or {"failed": why}."""
        try:
            pipe = self._running().stdin
            pipe.write(json.dumps(request) + "\n")
            pipe.flush()
            reply = self.replies.get(timeout=self.patience)
        except queue.Empty:
            self.stop()
            return {"failed": f"no answer within {self.patience:.0f} s"}
        except BrokenPipeError:
            reply = ""
        return json.loads(reply) if reply else {"failed": self._died()}

    def forget(self) -> None:
        """Let go of what was prepared."""
        if self.process is not None:
            self.ask({"forget": True})

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def _running(self) -> subprocess.Popen:
        if self.process is None:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends its workers.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )
            self.replies = queue.Queue()
            threading.Thread(target=_listen, args=(self.process, self.replies), daemon=True).start()
        return self.process

    def _died(self) -> str:
        code = self.process.wait()
        self.stop()
        name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process died with {name}"


def _listen(process: subprocess.Popen, replies: queue.Queue[str]) -> None:
    """Hand on each line; an empty one when the pipe ends."""
    for line in process.stdout:
        replies.put(line)
    replies.put("")
