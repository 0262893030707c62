"""The language-model demo: SmolLM2-135M at 50 % zeros by four methods, perplexity and tokens per second."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from ..data import fetch, load_model, load_tokenizer, perplexity, token_windows, wikitext2
from ..deploy import pack, report_of, save
from ..deploy.tensors import disk_bytes, memory_bytes
from ..recipes.prune import prune
from ..report.machine import hardware, versions
from ..report.packed import layer_rows
from ..report.record import Run, Setting
from ..runtime.decoder import Decoder
from .stages import Stages
from .timing import decode_rows, folder_bytes

Progress = Callable[[str, int, int], None]
PPL = "WikiText-2 perplexity"
TRAIN_CHARACTERS = 400_000  # calibration windows are drawn from this much text


@dataclass(frozen=True)
class Plan:
    """One method at 50 % zeros."""

    name: str
    method: str


PLANS = (Plan("magnitude 50 %", "magnitude"), Plan("Wanda 50 %", "wanda"), Plan("SparseGPT 50 %", "sparsegpt"))


@dataclass(frozen=True)
class Size:
    """How much text the demo reads: windows of `length` tokens for calibration and for perplexity."""

    calibration: int = 16
    test: int = 8
    length: int = 1024


FULL = Size()


def run(
    out: Path,
    *,
    seconds: float = 300.0,
    progress: Progress | None = None,
    size: Size = FULL,
) -> Run:
    """Prune the model by each method, measure perplexity, pack SparseGPT's for decoding and measure its speed.

    Args:
        out: folder for the packed model.
        seconds: about how long it may take; it bounds the time spent measuring speed.
        progress: called with (what, done, total).
        size: how much text to read.
    """
    began = time.perf_counter()
    stage = Stages(progress, 4 + len(PLANS))
    with stage("fetching the model and the text"):
        fetch("smollm2-135m"), fetch("wikitext2")
        dense, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
        test = token_windows(tokenizer, wikitext2("test"), length=size.length, count=size.test)
        calibration = _calibration(tokenizer, size)
    with stage("perplexity of the dense model"):
        settings = [_setting("dense", dense, perplexity(dense, test), 1.0, 0.0)]
    for plan in PLANS:
        with stage(plan.name):
            model, done_in = copy.deepcopy(dense), time.perf_counter()
            report = prune(model, plan.method, density=0.5, data=calibration, progress=stage.inner)
            done_in = time.perf_counter() - done_in
            settings.append(_setting(plan.name, model, perplexity(model, test), report.density, done_in))
    name, token = PLANS[-1].name, {"input_ids": test[:1, :1]}
    with stage(f"packing {name} for decoding"):
        packed = pack(model, token, inplace=True, remeasure=True)
        folder = save(packed, out / "packed", tokenizer=tokenizer)
        last = settings[-1]
        settings[-1] = replace(last, bytes_disk=folder_bytes(folder), bytes_memory=report_of(packed).bytes_after)
    with stage("tokens per second"):
        rivals = {
            "torch": dense,
            "torch + oneDNN": pack(dense, token, candidates=["dense/onednn"], repeats=1, remeasure=True),
            "gossamer's decoder, dense": _decoder(dense),
        }
        left = max(6.0, seconds - (time.perf_counter() - began))
        rows = decode_rows(rivals, {name: _decoder(packed)}, test[:1, :64], seconds=left / 2)
    return Run(
        title="SmolLM2-135M on WikiText-2",
        hardware=hardware(),
        versions=versions(("torch", "numba", "transformers")),
        settings=settings,
        engines=rows,
        layers=layer_rows(name, report_of(packed)),
        notes=(
            f"Perplexity over the first {size.test} windows of {size.length} tokens of WikiText-2's test text.",
            f"Calibration: {size.calibration} windows of {size.length} tokens of its training text, the same for all.",
            "The packaged weights are 4-bit; 'dense' means dequantised to float32, on disk too. The output head stays "
            "dense. Pruned models are stored as bitmasks.",
            f"Only {name} was packed for speed: all three have the same number of zeros in the same layers.",
            "Speed is of one token at a time after 64. The packed model runs in gossamer's decoder, and so does one of "
            "its dense rivals, with the same kernels but for the zeros; the others run in torch's eager mode. "
            "onnxruntime and OpenVINO are not measured here, for they need the key-value cache exported.",
        ),
        command="gossamer demo llm",
        load_lines=(
            "import gossamer, transformers; "
            f'model, tokenizer = gossamer.load("{folder}"), transformers.AutoTokenizer.from_pretrained("{folder}")',
            'ids = tokenizer("The spider").input_ids; '
            "print(tokenizer.decode(ids + gossamer.Decoder(model).generate(ids, 20)))",
        ),
    )


def _decoder(model: nn.Module) -> Callable[[int], Decoder]:
    """Makes the model's decoder for a number of threads."""
    return lambda threads: Decoder(model, max_tokens=128, threads=threads)


def _calibration(tokenizer, size: Size) -> list[dict[str, Tensor]]:
    text = wikitext2("train")[:TRAIN_CHARACTERS]
    windows = token_windows(tokenizer, text, length=size.length, count=size.calibration, seed=0)
    return [{"input_ids": w[None], "use_cache": False} for w in windows]


def _setting(name: str, model: nn.Module, ppl: float, density: float, seconds: float) -> Setting:
    return Setting(
        name, {PPL: ppl}, PPL, None, disk_bytes(model), memory_bytes(model), density, seconds,
        higher_is_better=False, quality_unit="",
    )  # fmt: skip
