"""SmolLM2-135M at 50 % zeros, recovered within 30 minutes of two cores: perplexity, zero-shot tasks, continuations.

Stopped at any moment, the same command goes on. Nothing is chosen by the test text.

    python -m benchmarks.recovery.run --work FOLDER [--seconds 3600] [--zero-shot 200]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.results import table, write_results
from gossamer.core.files import whole_file, whole_folder
from gossamer.data import load_model, load_tokenizer, perplexity, token_windows, wikitext2
from gossamer.recipes.prune import prune
from gossamer.recipes.recover import Distillation, recover

MODEL, LENGTH, TEST = "smollm2-135m", 1024, 24
CALIBRATION = 32
TRAIN, TRAIN_LENGTH, BATCH, LR = 1600, 512, 2, 5e-4
LOSS = Distillation(squarehead=1.0, cross_entropy=1.0)
PROMPTS = ("The spider waited in the corner of", "In 1905 , Albert Einstein", "Q: What is the capital of France?\nA:")
HEADS = ["model", "perplexity", "against dense", "zeros"]


class Bench:
    """A folder of what is done so far, and the stages that fill it."""

    def __init__(self, work: Path, seconds: float) -> None:
        self.work, self.seconds = work, seconds
        work.mkdir(parents=True, exist_ok=True)

    def pruned(self):
        folder = self.work / "pruned"
        if not folder.exists():
            model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
            windows = token_windows(tokenizer, wikitext2("train"), length=LENGTH, count=CALIBRATION, seed=0)
            data = [{"input_ids": w[None], "use_cache": False} for w in windows]
            prune(model, "sparsegpt", density=0.5, data=data, workdir=self.work / "journal")
            _keep(model, folder)
        return _load(folder)

    def recovered(self):
        folder = self.work / "recovered"
        if not folder.exists():
            model, teacher = self.pruned(), load_model(MODEL).bfloat16()
            text = wikitext2("train")
            windows = token_windows(load_tokenizer(MODEL), text, length=TRAIN_LENGTH, count=TRAIN, seed=1)
            report = recover(
                model,
                teacher,
                [{"input_ids": part} for part in windows.split(BATCH)],
                steps=10**6,
                seconds=self.seconds,
                lr=LR,
                loss=LOSS,
                checkpoint=self.work / "recover.safetensors",
                save_every=300.0,
                clock=time.process_time,
                progress=lambda what, step, steps: print(step, steps, what, flush=True),
            )
            self.once("recovery", lambda: asdict(report))
            _keep(model, folder)
        return _load(folder)

    def once(self, name: str, make: Callable[[], object]):
        """What was made before, or is made now and kept."""
        file = self.work / f"{name}.json"
        if not file.exists():
            made = make()
            with whole_file(file) as draft:
                draft.write_text(json.dumps(made, indent=1))
        return json.loads(file.read_text())


def _load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _keep(model, folder: Path) -> None:
    with whole_folder(folder) as draft:
        model.save_pretrained(draft)


def judged(model) -> dict[str, object]:
    """Loss of each test window, share of zeros, and continuations."""
    tokenizer = load_tokenizer(MODEL)
    windows = token_windows(tokenizer, wikitext2("test"), length=LENGTH, count=TEST)
    losses = [math.log(perplexity(model, w[None])) for w in windows]
    linears = [m.weight for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in linears) / sum(w.numel() for w in linears)
    return {"losses": losses, "zeros": zeros, "texts": {p: _continued(model, tokenizer, p) for p in PROMPTS}}


def asked(model, count: int) -> dict[str, object]:
    """Zero-shot accuracies on packaged sets."""
    from gossamer.integrations.lm_eval import zero_shot

    return {name: asdict(score) for name, score in zero_shot(model, load_tokenizer(MODEL), count=count).items()}


@torch.no_grad()
def _continued(model, tokenizer, prompt: str, tokens: int = 40) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _ppl(found: dict) -> float:
    return math.exp(statistics.fmean(found["losses"]))


def _rows(found: dict[str, dict], scores: dict[str, dict]) -> list[list[str]]:
    dense = _ppl(found["dense"])
    rows = []
    for name, held in found.items():
        ppl, tasks = _ppl(held), scores.get(name, {}).values()
        shown = [f"{100 * s['accuracy']:.1f} ± {100 * s['error']:.1f} %" for s in tasks]
        rows.append([name, f"{ppl:.2f}", f"{100 * (ppl / dense - 1):+.1f} %", f"{held['zeros']:.1%}", *shown])
    return rows


def _notes(recovery: dict, found: dict[str, dict], count: int) -> list[str]:
    notes = [
        f"SparseGPT with {CALIBRATION} windows of {LENGTH} tokens of WikiText-2 train, then {recovery['steps']} steps "
        f"of {BATCH}x{TRAIN_LENGTH} tokens of it, {recovery['seconds']:.0f} processor seconds "
        f"({recovery['seconds'] / 120:.1f} minutes of two cores); SquareHead and cross-entropy 1:1, rate {LR:g}.",
        f"Perplexity over the first {TEST} windows of {LENGTH} tokens of WikiText-2 test. Recovery also learns the "
        "kind of text it reads, which the dense model, tuned to follow instructions, was not given.",
        f"State in memory: {recovery['bytes'] / 1e6:.0f} MB beside the activations of one batch.",
    ]
    if count:
        notes.append(f"Zero-shot: lm-eval, {count} texts each, the same for all; ± is one standard error.")
    samples = [f"After {p!r} {name}: {held['texts'][p]!r}" for p in PROMPTS for name, held in found.items()]
    return [*notes, *samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is done so far")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the processor, for recovery")
    parser.add_argument("--zero-shot", type=int, default=0, help="texts of each task; 0 = none")
    parser.add_argument("--only", choices=["recover"], help="stop after recovery")
    options = parser.parse_args()
    bench = Bench(options.work, options.seconds)
    if options.only:
        bench.recovered()
        return
    models = {"dense": lambda: load_model(MODEL), "SparseGPT 50 %": bench.pruned, "recovered": bench.recovered}
    newest_first = reversed(models.items())
    found = {name: bench.once(f"judged-{name}", lambda make=make: judged(make())) for name, make in newest_first}
    found, scores = {name: found[name] for name in models}, {}
    for name, make in models.items():
        if options.zero_shot:
            again = lambda make=make: asked(make(), options.zero_shot)
            scores[name] = bench.once(f"zero-shot-{options.zero_shot}-{name}", again)
    recovery = bench.once("recovery", dict)
    heads = [*HEADS, *scores.get("dense", {})]
    rows, notes = _rows(found, scores), _notes(recovery, found, options.zero_shot)
    page = write_results("recovery", {"recovery": recovery, "models": found, "zero_shot": scores}, heads, rows, notes)
    print(table(heads, rows), f"written to {page}", sep="\n")


if __name__ == "__main__":
    main()
