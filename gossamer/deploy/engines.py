"""engines: the dense model in the best dense engines, beside packed models, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import BudgetError, GossamerError, unknown
from .examples import Example, call, difference, tensors
from .export import export_onnx, named_inputs
from .pack import pack
from .runners import RUNNERS, bind_torch, runner
from .save import save
from .skeleton import describe
from .tensors import memory_bytes
from .timing import in_turn, median, torch_threads

# Relative to the largest output; bf16 keeps 8 bits and its error grows over a model's depth.
TOLERANCE = {"torch": 1e-3, "onnxruntime": 1e-3, "openvino": 1e-3, "openvino-bf16": 1e-1}
OTHERWISE = 1e-3
# The runner of a whole network stands in a room above this one.
WHOLE = "gossamer.runtime.runner:whole_network"
LATENCY, THROUGHPUT = "latency", "throughput"
# Limit on starting, loading and checking one engine; a busy machine may need tens of seconds.
START_SECONDS = 180.0
# Engines that start at the same time.
STARTERS = 2
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Engine:
    """One way to run the dense model.

    Args:
        name: as shown in tables.
        kind: which runner serves it.
        version: of the library.
    """

    name: str
    kind: str
    version: str


@dataclass(frozen=True)
class Speed:
    """One engine at one number of threads.

    Args:
        engine: as shown in tables; a packed model's own name where it is one.
        version: of the library that ran it.
        threads: threads it was given.
        latency_ms: median of one item at a time, None where it could not run.
        latency_iqr: distance between the quartiles, milliseconds.
        throughput: items per second in batches of `batch`.
        batch: items in a batch.
        batch_ms: median of one batch.
        batch_iqr: distance between the quartiles, milliseconds.
        nbytes: tensors held, exactly, where gossamer holds them; else None.
        rss: what the process grew by when the model for one item was made and run once, bytes.
        difference: largest output difference from torch, relative to the largest output.
        note: why it could not run, or what to know.
    """

    engine: str
    version: str
    threads: int
    latency_ms: float | None = None
    latency_iqr: float | None = None
    throughput: float | None = None
    batch: int = 1
    batch_ms: float | None = None
    batch_iqr: float | None = None
    nbytes: int | None = None
    rss: int | None = None
    difference: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return asdict(self)


def available() -> tuple[Engine, ...]:
    """The dense engines that are installed here, torch's own first."""
    torch_version = version("torch")
    found = [Engine("torch", "torch", torch_version), Engine("torch + oneDNN", "torch", torch_version)]
    for name, kind, package in (
        ("onnxruntime", "onnxruntime", "onnxruntime"),
        ("OpenVINO", "openvino", "openvino"),
        ("OpenVINO bf16", "openvino-bf16", "openvino"),
    ):
        try:
            found.append(Engine(name, kind, version(package)))
        except PackageNotFoundError:
            continue
    return tuple(e for e in found if e.kind != "openvino-bf16" or _has_bf16())


def _has_bf16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def first_item(example: Example) -> Example:
    """The example's first item alone: every tensor cut to one along its first axis."""
    if isinstance(example, Mapping):
        return {k: v[:1].contiguous() if isinstance(v, Tensor) else v for k, v in example.items()}
    if isinstance(example, tuple):
        return tuple(v[:1].contiguous() if isinstance(v, Tensor) else v for v in example)
    return example[:1].contiguous()


def measure_engines(
    dense: nn.Module,
    example: Example,
    *,
    packed: Mapping[str, nn.Module] | None = None,
    whole: Mapping[str, nn.Module] | None = None,
    single: Example | None = None,
    threads: Sequence[int] = (1, 2),
    seconds_each: float = 2.0,
    rounds: int = 3,
    include: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[Speed]:
    """Time the dense model in every engine and packed models in gossamer, all under the same conditions.

    Each engine at each number of threads has a process of its own, with sleeping thread pools. All are started
    and checked against torch first; then they are timed in turn, several rounds, so that a noisy minute is
    unfair to none. Engines that read files get the model exported at exactly these shapes.

    Args:
        dense: the dense model: of transformers or gossamer.data.vision, for its class is built again elsewhere.
        example: a batch; its first axis counts items.
        packed: packed models by name, run layer by layer.
        whole: packed models by name, run as `gossamer.compile` makes them.
        single: one item, for the latency; by default the first of the batch.
        threads: numbers of threads.
        seconds_each: time spent on each engine at each number of threads, besides its start.
        rounds: how many turns that time is cut into.
        include: names of dense engines; all that are installed when None.
        progress: called with (engine, done, total).

    Returns:
        A line per engine and number of threads; those that could not run say why.

    Raises:
        GossamerError: a model is of your own class, which another process cannot build.

    Example:
        >>> lines = measure_engines(model, batch, packed={"80 % in 4-row groups": small})  # doctest: +SKIP
    """
    if seconds_each <= 0 or rounds < 1 or not threads or min(threads) < 1:
        raise BudgetError("seconds_each must be positive, rounds at least 1 and threads whole numbers from 1")
    for name in include or ():
        if name not in {e.name for e in available()}:
            raise unknown("installed engine", name, [e.name for e in available()])
    with tempfile.TemporaryDirectory(prefix="gossamer-engines-") as folder:
        bench = _Bench(Path(folder), example, first_item(example) if single is None else single, progress)
        bench.add_dense(dense, include)
        for name, model in (packed or {}).items():
            bench.add_packed(name, model)
        for name, model in (whole or {}).items():
            bench.add_packed(name, model, kind=WHOLE)
        return bench.run(threads, seconds_each, rounds)


@dataclass
class _Entry:
    """What one engine runs: a model file per case, and what must come out."""

    engine: Engine
    models: dict[str, Path] = field(default_factory=dict)
    wanted: str = "dense"
    nbytes: int | None = None
    problem: str = ""


class _Bench:
    """One call of `measure_engines`."""

    def __init__(self, folder: Path, batch: Example, single: Example, progress: Progress | None) -> None:
        self.folder, self.progress = folder, progress
        self.cases = {LATENCY: single, THROUGHPUT: batch}
        self.batch = next(iter(named_inputs(batch).values())).shape[0]
        self.entries: list[_Entry] = []
        for name, example in self.cases.items():
            save_file(_plain(named_inputs(example)), folder / f"{name}.inputs")

    def add_dense(self, model: nn.Module, include: Sequence[str] | None) -> None:
        chosen = [e for e in available() if include is None or e.name in include]
        for engine in chosen:
            entry = _Entry(engine)
            self.entries.append(entry)
            if engine.kind == "torch":
                try:
                    runs = model if engine.name == "torch" else _with_onednn(model, self.cases[THROUGHPUT])
                except GossamerError as error:
                    entry.problem = str(error)
                    continue
                entry.models = dict.fromkeys(self.cases, self._saved(engine.name, runs))
                entry.nbytes = memory_bytes(runs)
        if chosen:
            self._want("dense", model)
        if any(e.kind != "torch" for e in chosen):
            self._export(model)

    def add_packed(self, name: str, model: nn.Module, kind: str = "torch") -> None:
        from .. import __version__

        self._want(name, model)
        where = self._saved(name, model)
        engine = Engine(name, kind, __version__)
        self.entries.append(_Entry(engine, dict.fromkeys(self.cases, where), name, memory_bytes(model)))

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
            with ThreadPoolExecutor(STARTERS) as pool:
                ready = list(pool.map(lambda w: w if isinstance(w, str) else w.prepare(), workers))
            for done in range(rounds):
                for i, entry in enumerate(self.entries):
                    if isinstance(ready[i], dict):
                        ready[i] = workers[i].take_turn(slice_s, times[i]) or ready[i]
                    if self.progress is not None:
                        step = (turn * rounds + done) * len(self.entries) + i + 1
                        self.progress(f"{entry.engine.name}, threads: {threads}", step, total)
        return [self._line(entry, threads, answer, taken) for entry, answer, taken in zip(self.entries, ready, times)]

    def _want(self, name: str, model: nn.Module) -> None:
        for case, example in self.cases.items():
            found = {f"output_{i:03d}": t for i, t in enumerate(tensors(call(model.eval(), example)))}
            save_file(_plain(found), self._wanted_file(name, case))

    def _wanted_file(self, name: str, case: str) -> Path:
        return self.folder / f"{_slug(name)}.{case}.wanted"

    def _saved(self, name: str, model: nn.Module) -> Path:
        if describe(model)["kind"] == "own":
            raise GossamerError(
                f"{type(model).__name__} is a class of your own (or was changed since it was built), and another "
                "process cannot build it; time it in this process with gossamer.deploy.engines.time_here"
            )
        return save(model, self.folder / f"{_slug(name)}.model")

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

    def _start(self, stack: ExitStack, entry: _Entry, threads: int) -> _Worker | str:
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
        file = self.folder / f"{_slug(entry.engine.name)}.{threads}.json"
        file.write_text(json.dumps(spec))
        return stack.enter_context(_worker(file, threads))

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


class _Worker:
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
def _worker(spec: Path, threads: int) -> Iterator[_Worker]:
    count = str(threads)
    # Only one engine is at work at a time, so each may spin for a moment between its own calls, as it would alone.
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    environment.pop("OMP_WAIT_POLICY", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    worker = _Worker(
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
        yield worker
    finally:
        if worker.process is not None:
            _end(worker.process)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()
    with suppress(BrokenPipeError):
        process.stdin.close()


@dataclass(frozen=True)
class Ready:
    """An engine in this process, checked against torch.

    Args:
        name: as shown in tables.
        version: of the library.
        run: runs the example once and returns its outputs as arrays; None where the engine cannot.
        difference: largest output difference from torch, relative to the largest output.
        note: why it cannot run.
    """

    name: str
    version: str
    run: Callable[[], list] | None
    difference: float | None = None
    note: str = ""


def engines(model: nn.Module, example: Example, *, threads: int = 1) -> list[Ready]:
    """The dense model in every engine installed here, at the example's shapes, in this process.

    For timing use `measure_engines`: engines that share a process disturb each other.

    Args:
        threads: for onnxruntime and OpenVINO; torch keeps its own setting.

    Example:
        >>> [e.name for e in engines(model, batch)]  # doctest: +SKIP
        ['torch', 'torch + oneDNN', 'onnxruntime', 'OpenVINO', 'OpenVINO bf16']
    """
    want = [t.detach() for t in tensors(call(model.eval(), example))]
    with tempfile.TemporaryDirectory(prefix="gossamer-engines-") as folder:
        file = Path(folder) / "model.onnx"
        return [_ready(engine, model, example, want, file, threads) for engine in available()]


def _ready(engine: Engine, model: nn.Module, example: Example, want: list[Tensor], file: Path, threads: int) -> Ready:
    arrays = {name: t.detach().cpu().numpy() for name, t in named_inputs(example).items()}
    try:
        if engine.kind == "torch":
            run = bind_torch(model if engine.name == "torch" else _with_onednn(model, example))(arrays)
        else:
            exported = file if file.exists() else export_onnx(model, example, file)
            run = runner(engine.kind, exported, threads)(arrays)
        off = difference([torch.as_tensor(y) for y in run()], want)
    except (GossamerError, RuntimeError, ValueError) as error:
        return Ready(engine.name, engine.version, None, note=str(error))
    if off > TOLERANCE[engine.kind]:
        return Ready(engine.name, engine.version, None, off, "its results are off torch's")
    return Ready(engine.name, engine.version, run, off)


def _with_onednn(model: nn.Module, example: Example) -> nn.Module:
    return pack(model, example, candidates=["dense/onednn"], repeats=1, remeasure=True)


def time_here(models: Mapping[str, nn.Module], example: Example, *, threads: int = 1, rounds: int = 9) -> list[Speed]:
    """Time models in this very process, in turn: for classes of your own, which another process cannot build.

    Args:
        models: by name.
        example: a batch; its first axis counts items.
        threads: torch's and ours.
        rounds: runs of each.
    """
    single, batch = first_item(example), next(iter(named_inputs(example).values())).shape[0]
    with torch_threads(threads):
        one, many = (
            {n: median(t) for n, t in in_turn({n: _calling(m.eval(), e) for n, m in models.items()}, rounds).items()}
            for e in (single, example)
        )
    return [
        Speed(
            engine=name,
            version=version("torch"),
            threads=threads,
            latency_ms=one[name].ms,
            latency_iqr=one[name].spread,
            throughput=1e3 * batch / many[name].ms,
            batch=batch,
            batch_ms=many[name].ms,
            batch_iqr=many[name].spread,
            nbytes=memory_bytes(model),
            note="timed in a shared process",
        )
        for name, model in models.items()
    ]


def _calling(model: nn.Module, example: Example) -> Callable[[], object]:
    return lambda: call(model, example)


def _plain(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in found.items()}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name) + f"-{abs(hash(name)) % 9973}"
