"""engines: the dense model in the best dense engines, beside packed models, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import BudgetError, GossamerError, unknown
from .contest import WHOLE, Contest
from .engine import TOLERANCE, Engine, Speed, available, first_item, with_onednn
from .examples import Example, call, difference, tensors
from .export import export_onnx, named_inputs
from .runners import bind_torch, runner
from .tensors import memory_bytes
from .timing import in_turn, median, torch_threads

Progress = Callable[[str, int, int], None]


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
        contest = Contest(Path(folder), example, first_item(example) if single is None else single, progress)
        contest.add_dense(dense, include)
        for name, model in (packed or {}).items():
            contest.add_packed(name, model)
        for name, model in (whole or {}).items():
            contest.add_packed(name, model, kind=WHOLE)
        return contest.run(threads, seconds_each, rounds)


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
            run = bind_torch(model if engine.name == "torch" else with_onednn(model, example))(arrays)
        else:
            exported = file if file.exists() else export_onnx(model, example, file)
            run = runner(engine.kind, exported, threads)(arrays)
        off = difference([torch.as_tensor(y) for y in run()], want)
    except (GossamerError, RuntimeError, ValueError) as error:
        return Ready(engine.name, engine.version, None, note=str(error))
    if off > TOLERANCE[engine.kind]:
        return Ready(engine.name, engine.version, None, off, "its results are off torch's")
    return Ready(engine.name, engine.version, run, off)


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
