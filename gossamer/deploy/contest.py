"""contest: one model in several engines, each in a process of its own, timed in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import GossamerError
from .engine import OTHERWISE, TOLERANCE, Engine, Speed, available, with_onednn
from .examples import Example, call, tensors
from .export import export_onnx, named_inputs
from .processes import Worker, worker
from .runners import RUNNERS
from .save import save
from .skeleton import describe
from .tensors import memory_bytes
from .timing import median

# The runner of a whole network stands in a room above this one.
WHOLE = "gossamer.runtime.runner:whole_network"
LATENCY, THROUGHPUT = "latency", "throughput"
# Engines that start at the same time.
STARTERS = 2
Progress = Callable[[str, int, int], None]


@dataclass
class _Entry:
    """What one engine runs: a model file per case, and what must come out.

    Files bear an entry's number: names may be alike, or the same.
    """

    engine: Engine
    files: str
    models: dict[str, Path] = field(default_factory=dict)
    wanted: str = "dense"
    nbytes: int | None = None
    problem: str = ""


class Contest:
    """One call of `measure_engines`."""

    def __init__(self, folder: Path, batch: Example, single: Example, progress: Progress | None) -> None:
        self.folder, self.progress = folder, progress
        self.cases = {LATENCY: single, THROUGHPUT: batch}
        self.batch = next(iter(named_inputs(batch).values())).shape[0]
        self.entries: list[_Entry] = []
        for name, example in self.cases.items():
            save_file(_plain(named_inputs(example)), folder / f"{name}.inputs")

    def add_dense(self, model: nn.Module, include: Sequence[str] | None) -> None:
        """Enter the dense model in every engine named, or in all that are installed."""
        chosen = [e for e in available() if include is None or e.name in include]
        for engine in chosen:
            entry = self._entered(engine)
            if engine.kind == "torch":
                try:
                    runs = model if engine.name == "torch" else with_onednn(model, self.cases[THROUGHPUT])
                except GossamerError as error:
                    entry.problem = str(error)
                    continue
                entry.models = dict.fromkeys(self.cases, self._saved(entry, runs))
                entry.nbytes = memory_bytes(runs)
        if chosen:
            self._want("dense", model)
        if any(e.kind != "torch" for e in chosen):
            self._export(model)

    def add_packed(self, name: str, model: nn.Module, kind: str = "torch") -> None:
        """Enter a packed model: layer by layer, or as another runner has it."""
        from .. import __version__

        entry = self._entered(Engine(name, kind, __version__))
        self._want(entry.files, model)
        entry.wanted, entry.nbytes = entry.files, memory_bytes(model)
        entry.models = dict.fromkeys(self.cases, self._saved(entry, model))

    def _entered(self, engine: Engine) -> _Entry:
        entry = _Entry(engine, str(len(self.entries)))
        self.entries.append(entry)
        return entry

    def run(self, threads: Sequence[int], seconds_each: float, rounds: int) -> list[Speed]:
        """One number of threads after the other, so that no more processes wait in memory than are compared."""
        total = len(threads) * rounds * len(self.entries)
        lines = [self._compare(count, seconds_each, rounds, i, total) for i, count in enumerate(threads)]
        return [line for of_entry in zip(*lines) for line in of_entry]

    def _compare(self, threads: int, seconds_each: float, rounds: int, turn: int, total: int) -> list[Speed]:
        times = [{LATENCY: [], THROUGHPUT: []} for _ in self.entries]
        slice_s = seconds_each / rounds / len(self.cases)
        with ExitStack() as stack:
            workers = [self._start(stack, entry, threads) for entry in self.entries]
            ready = self._prepared(workers)
            for done in range(rounds):
                for i, entry in enumerate(self.entries):
                    if isinstance(ready[i], dict):
                        ready[i] = workers[i].take_turn(slice_s, times[i]) or ready[i]
                    if self.progress is not None:
                        step = (turn * rounds + done) * len(self.entries) + i + 1
                        self.progress(f"{entry.engine.name}, threads: {threads}", step, total)
        return [self._line(entry, threads, answer, taken) for entry, answer, taken in zip(self.entries, ready, times)]

    def _prepared(self, workers: Sequence[Worker | str]) -> list[dict | str]:
        """What every engine says of itself. Whole networks choose by measuring, so each of them starts alone."""
        prepare = lambda w: w if isinstance(w, str) else w.prepare()
        alone = [entry.engine.kind == WHOLE for entry in self.entries]
        with ThreadPoolExecutor(STARTERS) as pool:
            others = pool.map(prepare, [w for w, one in zip(workers, alone) if not one])
        return [prepare(w) if one else next(others) for w, one in zip(workers, alone)]

    def _want(self, files: str, model: nn.Module) -> None:
        for case, example in self.cases.items():
            found = {f"output_{i:03d}": t for i, t in enumerate(tensors(call(model.eval(), example)))}
            save_file(_plain(found), self._wanted_file(files, case))

    def _wanted_file(self, files: str, case: str) -> Path:
        return self.folder / f"{files}.{case}.wanted"

    def _saved(self, entry: _Entry, model: nn.Module) -> Path:
        if describe(model)["kind"] == "own":
            raise GossamerError(
                f"{type(model).__name__} is a class of your own (or was changed since it was built), and another "
                "process cannot build it; time it in this process with gossamer.deploy.engines.time_here"
            )
        return save(model, self.folder / f"{entry.files}.model")

    def _export(self, model: nn.Module) -> None:
        files, problem = {}, ""
        try:
            for case, example in self.cases.items():
                files[case] = export_onnx(model, example, self.folder / f"{case}.onnx")
        except GossamerError as error:
            problem = str(error)
        for entry in self.entries:
            if entry.engine.kind in RUNNERS and entry.engine.kind != "torch":
                entry.models, entry.problem = files, problem

    def _start(self, stack: ExitStack, entry: _Entry, threads: int) -> Worker | str:
        if entry.problem:
            return entry.problem
        cases = {
            case: {
                "model": str(entry.models[case]),
                "inputs": str(self.folder / f"{case}.inputs"),
                "wanted": str(self._wanted_file(entry.wanted, case)),
            }
            for case in self.cases
        }
        kind = entry.engine.kind
        spec = {"kind": kind, "threads": threads, "tolerance": TOLERANCE.get(kind, OTHERWISE), "cases": cases}
        file = self.folder / f"{entry.files}.{threads}.json"
        file.write_text(json.dumps(spec))
        return stack.enter_context(worker(file, threads))

    def _line(self, entry: _Entry, threads: int, answer: dict | str, taken: dict[str, list[float]]) -> Speed:
        engine = entry.engine
        if isinstance(answer, str):
            return Speed(engine.name, engine.version, threads, batch=self.batch, note=answer)
        latency, batch = median(taken[LATENCY]), median(taken[THROUGHPUT])
        return Speed(
            engine=engine.name,
            version=engine.version,
            threads=threads,
            latency_ms=latency.ms,
            latency_iqr=latency.spread,
            throughput=1e3 * self.batch / batch.ms,
            batch=self.batch,
            batch_ms=batch.ms,
            batch_iqr=batch.spread,
            nbytes=entry.nbytes,
            rss=answer["rss"] or None,
            difference=answer["difference"],
            note="rounds weights and activations to bf16" if engine.kind == "openvino-bf16" else "",
        )


def _plain(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in found.items()}
