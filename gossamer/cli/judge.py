"""Perplexity, size and continuations of one model of a job, and the report's record of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.errors import CalibrationError
from .screen import bar, waiting
from .stages import Evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..report import Run
    from .job import Job
    from .models import Loaded
    from .recipe import Recipe

PPL, USUAL_LENGTH, WIKITEXT = "perplexity", 1024, "asset:wikitext2"


def judged(asked: Recipe, how: Evaluate, spec: str, name: str) -> dict[str, object]:
    """One model's figures and texts, JSON-ready.

    Raises:
        CalibrationError: the model does not predict next tokens, has no tokenizer, or there is no held-out text.
    """
    from ..data import perplexity
    from ..deploy.tensors import disk_bytes, memory_bytes
    from . import models

    with waiting(f"loading {spec}"):
        loaded = models.load(spec)
        _refuse_what_has_no_perplexity(loaded)
        held = {"disk": disk_bytes(loaded.model), "memory": memory_bytes(loaded.model), "density": _density(loaded)}
        loaded.model.float()
        windows = _windows(asked, how, loaded)
    with bar(f"evaluating {name}") as progress:
        ppl = perplexity(loaded.model, windows, progress=lambda done, total: progress("", done, total))
    with waiting("writing samples"):
        texts = {prompt: _continued(loaded, prompt, how.tokens) for prompt in how.prompts}
    asked_of = _asked(loaded, how.zero_shot) if how.zero_shot else {}
    return {"quality": {PPL: ppl, **asked_of}, "texts": texts, "windows": list(windows.shape), **held}


def _asked(loaded: Loaded, count: int) -> dict[str, float]:
    """Zero-shot accuracies, by a label for the reader."""
    from ..integrations.lm_eval import zero_shot

    with waiting(f"asking {loaded.spec} without examples"):
        found = zero_shot(loaded.model, loaded.tokenizer, count=count)  # type: ignore[arg-type]
    return {f"{task} accuracy, {score.count} texts": score.accuracy for task, score in found.items()}


def _refuse_what_has_no_perplexity(loaded: Loaded) -> None:
    if not loaded.causal or loaded.tokenizer is None:
        raise CalibrationError(
            f"{loaded.spec} does not predict next tokens or has no tokenizer, so it has no perplexity; leave "
            "evaluate: out of the recipe"
        )


def _windows(asked: Recipe, how: Evaluate, loaded: Loaded) -> torch.Tensor:
    from ..data import token_windows

    length = how.length or min(USUAL_LENGTH, loaded.longest or USUAL_LENGTH)
    return token_windows(loaded.tokenizer, _text(asked, how), length=length, count=how.windows)


def _text(asked: Recipe, how: Evaluate) -> str:
    from ..data import wikitext2

    source = held_out(asked, how)
    if source == WIKITEXT:
        return wikitext2("test")
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"evaluate.data {source!r} cannot be read ({error}); give a UTF-8 text file") from error


def held_out(asked: Recipe, how: Evaluate) -> str:
    """Where the text of the perplexity comes from.

    Raises:
        CalibrationError: the recipe names none that has a held-out part.
    """
    source = how.data or (WIKITEXT if asked.data == WIKITEXT else "")
    if not source or (source.startswith("asset:") and source != WIKITEXT):
        raise CalibrationError(
            f"evaluate has no held-out text ({source!r}); give it data: a text file that nothing was trained on, or "
            f"{WIKITEXT}"
        )
    return source


@torch.no_grad()
def _continued(loaded: Loaded, prompt: str, tokens: int) -> str:
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids  # type: ignore[misc]
    room = (loaded.longest or tokens + ids.shape[1]) - ids.shape[1]
    pad = loaded.tokenizer.eos_token_id or loaded.tokenizer.pad_token_id or 0  # type: ignore[union-attr]
    out = loaded.model.generate(ids, max_new_tokens=max(1, min(tokens, room)), do_sample=False, pad_token_id=pad)  # type: ignore[operator]
    return loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)  # type: ignore[union-attr]


def _density(loaded: Loaded) -> float:
    """Of the layers that pruning takes by default."""
    from ..attach.targets import find

    weights = [t.weight(loaded.model) for t in find(loaded.model).targets]
    return sum(int((w != 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)


def story(job: Job, found: Mapping[str, Mapping[str, object]]) -> Run:
    """What the page tells: a setting per model, the packed layers of the last, continuations side by side."""
    from ..report import Run, Sample
    from ..report.machine import hardware, versions

    layers, size = _packed(job, list(found)[-1])
    settings = [_setting(job, name, held, size if name == list(found)[-1] else None) for name, held in found.items()]
    prompts = job.stages.evaluate.prompts if job.stages.evaluate else ()
    count, length = next(iter(found.values()))["windows"]  # type: ignore[misc]
    return Run(
        title=f"{job.asked.model} pruned by {job.asked.method}",
        hardware=hardware(),
        versions=versions(("torch", "numba", "transformers")),
        settings=settings,
        engines=(),
        layers=layers,
        samples=[Sample(p, {name: held["texts"][p] for name, held in found.items()}) for p in prompts],  # type: ignore[index]
        notes=_notes(job, count, length),
        command=f"gossamer prune --recipe RECIPE.yaml --out {job.out}",
    )


def _setting(job: Job, name: str, held: Mapping, size: tuple[int, int] | None):
    from ..report import Setting

    spent = job.spent
    seconds = 0.0 if name == "dense" else spent.get("pruned", 0.0)
    seconds += spent.get("recovered", 0.0) if name == "recovered" else 0.0
    disk, memory = size or (held["disk"], held["memory"])
    density = 1.0 if name == "dense" else held["density"]
    return Setting(name, held["quality"], PPL, None, disk, memory, density, seconds, False, "")


def _packed(job: Job, name: str) -> tuple[list, tuple[int, int] | None]:
    if job.stages.pack is None:
        return [], None
    from .. import load
    from ..demos.timing import folder_bytes
    from ..deploy import report_of
    from ..report.packed import layer_rows

    report = report_of(load(job.out / "packed"))
    return layer_rows(name, report), (folder_bytes(job.out / "packed"), report.bytes_after)


def _notes(job: Job, count: int, length: int) -> list[str]:
    asked, told = job.asked, []
    where = held_out(asked, job.stages.evaluate)  # type: ignore[arg-type]
    part = "the test part of WikiText-2" if where == WIKITEXT else where
    told.append(f"Perplexity over the first {count} windows of {length} tokens of {part}.")
    if asked.data:
        told.append(f"Calibration: {asked.samples} texts or windows of {asked.data}, seed {asked.seed}.")
    if (how := job.stages.recover) is not None:
        told.append(
            f"Recovery: {how.samples} texts or windows of {how.data or asked.data}, at most {how.steps} steps"
            + (f" or {how.seconds:g} s ({how.clock})" if how.seconds else "")
            + ". It also learns the kind of text it reads, which the dense model was not given."
        )
    told.append("Continuations take the likeliest token each time.")
    return told
