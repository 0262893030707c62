"""engine: the dense engines that are installed, and what is said of one when it was timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor, nn

from .examples import Example
from .pack import pack

# Relative to the largest output; bf16 keeps 8 bits and its error grows over a model's depth.
TOLERANCE = {"torch": 1e-3, "onnxruntime": 1e-3, "openvino": 1e-3, "openvino-bf16": 1e-1}
OTHERWISE = 1e-3


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


def with_onednn(model: nn.Module, example: Example) -> nn.Module:
    """The dense model with its products through oneDNN where that measures faster."""
    return pack(model, example, candidates=["dense/onednn"], repeats=1, remeasure=True)
