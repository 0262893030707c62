"""Runners: one model in one engine, ready to be called; made inside the process that is timed.

Every runner maps named inputs to a list of output arrays. None of them imports what another needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import need, unknown

if TYPE_CHECKING:
    import numpy as np

Arrays = Mapping[str, "np.ndarray"]
Run = Callable[[], list]
# Makes a call for one set of inputs.
Bind = Callable[[str, Arrays], Run]


def onnxruntime_runner(model: str | Path, threads: int) -> Callable[[Arrays], Run]:
    """onnxruntime in fp32, at its own defaults."""
    ort = need("onnxruntime", "demo")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}

    def bind(arrays: Arrays) -> Run:
        feed = {name: a for name, a in arrays.items() if name in wanted}
        return lambda: session.run(None, feed)

    return bind


def openvino_runner(model: str | Path, threads: int, *, precision: str = "f32") -> Callable[[Arrays], Run]:
    """OpenVINO; "f32" is forced, for on processors with bf16 units it would round to bf16 by itself."""
    ov = need("openvino", "demo")
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned threads cannot step aside when something else runs on their core.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = ov.compile_model(ov.convert_model(str(model)), "CPU", options)
    wanted = [i.get_any_name() for i in compiled.inputs]
    request = compiled.create_infer_request()

    def bind(arrays: Arrays) -> Run:
        feed = {name: arrays[name] for name in wanted}

        def run() -> list:
            found = request.infer(feed, share_inputs=True, share_outputs=True)
            return [found[o] for o in compiled.outputs]

        return run

    return bind


def torch_runner(model: str | Path, threads: int) -> Callable[[Arrays], Run]:
    """A model that `gossamer.save` wrote, dense or packed, in torch."""
    import torch

    from .load import load

    torch.set_num_threads(threads)
    return bind_torch(load(model, verify=False))


def bind_torch(model) -> Callable[[Arrays], Run]:
    """A model in memory; inputs named input_0, input_1 ... are passed by position."""
    import torch

    from .examples import tensors

    def bind(arrays: Arrays) -> Run:
        inputs = {name: torch.from_numpy(a) for name, a in arrays.items()}
        positional = all(name.startswith("input_") and name[6:].isdigit() for name in inputs)

        def run() -> list:
            with torch.inference_mode():
                out = model(*inputs.values()) if positional else model(**inputs)
            return [t.numpy() for t in tensors(out)]

        return run

    return bind


RUNNERS = {
    "torch": torch_runner,
    "onnxruntime": onnxruntime_runner,
    "openvino": openvino_runner,
    "openvino-bf16": lambda model, threads: openvino_runner(model, threads, precision="bf16"),
}


def runner(kind: str, model: str | Path, threads: int) -> Callable[[Arrays], Run]:
    """The runner of that kind, or of another room as "module:function". Raises UnknownName with near names."""
    if ":" in kind:
        module, _, function = kind.partition(":")
        return getattr(import_module(module), function)(model, threads)
    if kind not in RUNNERS:
        raise unknown("engine", kind, RUNNERS)
    return RUNNERS[kind](model, threads)
