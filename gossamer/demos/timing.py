"""Speed of a demo's models: encoders in every engine, language models token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import __version__ as gossamer_version
from ..deploy.engines import Speed, measure_engines
from ..deploy.save import RECORD, TENSORS
from ..deploy.timing import median, torch_threads
from ..report.record import EngineRow
from ..runtime.decoder import Decoder

Progress = Callable[[str, int, int], None]
THREADS = (1, 2)
OURS = "gossamer"  # packed models, compiled as whole networks


def encoder_rows(
    dense: nn.Module,
    packed: Mapping[str, nn.Module],
    example: Mapping[str, Tensor],
    *,
    seconds: float,
    progress: Progress | None = None,
) -> tuple[list[EngineRow], list[str]]:
    """The dense model in every engine and the packed ones compiled by gossamer, one thread and two.

    Args:
        packed: packed models by setting.
        example: a batch of sentences; the latency is that of its first one.
        seconds: about how long to measure, besides starting the engines.

    Returns:
        Rows, and a note for every engine that could not run.
    """
    jobs = (5 + len(packed)) * len(THREADS)
    speeds = measure_engines(
        dense,
        example,
        whole=packed,
        threads=THREADS,
        seconds_each=max(0.6, seconds / jobs),
        progress=progress,
    )
    rows = [_row(s, packed) for s in speeds if s.throughput is not None]
    return rows, [f"{s.engine} with {s.threads} threads did not run: {s.note}" for s in speeds if s.throughput is None]


def _row(s: Speed, packed: Mapping[str, nn.Module]) -> EngineRow:
    return EngineRow(
        setting=s.engine if s.engine in packed else "dense",
        engine=OURS if s.engine in packed else s.engine,
        threads=s.threads,
        latency_ms=s.latency_ms,
        latency_iqr=s.latency_iqr,
        throughput=s.throughput,
        unit="sentences/s",
        version=s.version,
        note=s.note,
        precision="bf16" if s.engine.endswith("bf16") else "fp32",
    )


# A model that transformers calls token by token, or what makes a decoder for a number of threads.
Speaker = nn.Module | Callable[[int], Decoder]


def decode_rows(
    dense: Mapping[str, Speaker],
    packed: Mapping[str, Speaker],
    prompt: Tensor,
    *,
    tokens: int = 24,
    seconds: float = 60.0,
) -> list[EngineRow]:
    """Tokens per second, one sequence, greedy, after a prompt: median over single tokens, models taking turns.

    Args:
        dense: the dense model by engine, or a function of the threads that makes its decoder.
        packed: packed models by setting, likewise.
        prompt: token ids [1, T].
        tokens: tokens of one turn.
        seconds: about how long to measure in all.
    """
    models = {
        (name, threads): model if isinstance(model, nn.Module) else model(threads)
        for threads in THREADS
        for name, model in {**dense, **packed}.items()
    }
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in models}
    until = time.perf_counter() + seconds
    with torch.no_grad():
        while time.perf_counter() < until or not all(taken.values()):
            for name, threads in taken:
                with torch_threads(threads):
                    taken[name, threads] += _decode(models[name, threads], prompt, tokens)
    return [_token_row(name, threads, ms, ours=name in packed) for (name, threads), ms in taken.items()]


def _decode(model: nn.Module | Decoder, prompt: Tensor, tokens: int) -> list[float]:
    """Milliseconds of each token after the first two, which still warm caches."""
    if isinstance(model, Decoder):
        return _decode_by_steps(model, prompt, tokens)
    out, times = model(input_ids=prompt, use_cache=True), []
    for _ in range(tokens):
        began = time.perf_counter()
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        times.append((time.perf_counter() - began) * 1e3)
    return times[2:]


def _decode_by_steps(decoder: Decoder, prompt: Tensor, tokens: int) -> list[float]:
    decoder.reset()
    logits, times = decoder.prefill(prompt[0]), []
    for _ in range(tokens):
        began = time.perf_counter()
        logits = decoder.step(int(logits.argmax()))
        times.append((time.perf_counter() - began) * 1e3)
    return times[2:]


def _token_row(name: str, threads: int, taken: list[float], *, ours: bool) -> EngineRow:
    time_ms = median(taken)
    return EngineRow(
        setting=name if ours else "dense",
        engine=OURS if ours else name,
        threads=threads,
        latency_ms=time_ms.ms,
        latency_iqr=time_ms.spread,
        throughput=1e3 / time_ms.ms,
        unit="tokens/s",
        version=gossamer_version if ours else torch.__version__,
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of a saved model's own files, without the tokenizer's."""
    return sum((folder / name).stat().st_size for name in (TENSORS, RECORD))
