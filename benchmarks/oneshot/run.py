"""One-shot pruning of SmolLM2-135M at 50 %, 60 % and 2:4: our recipe beside the official SparseGPT procedure.

Every run keeps what is finished (blocks, test windows) in a folder and goes on from there; the table is made of the
runs that are complete. Seconds are those of the processor, with one thread, so that other work hardly counts.

    python -m benchmarks.oneshot.run [--work FOLDER] [--only SETTING:LABEL:SEED ...] [--write]
    python -m benchmarks.oneshot.run --quick
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.oneshot import official
from benchmarks.results import table, write_results
from gossamer import Reconstruct, prune
from gossamer.core.files import whole_file
from gossamer.data import load_model, load_tokenizer, perplexity, token_windows, wikitext2

CALIBRATION, TEST, LENGTH = 16, 24, 1024
WORK = Path(tempfile.gettempdir()) / "gossamer-oneshot"
SETTINGS = {"50 %": {"density": 0.5}, "60 %": {"density": 0.4}, "2:4": {"pattern": "2:4"}}
SOLVER = {"method": "alps", "damping": 0.1}
OURS = {
    "solver only": SOLVER,
    "+ local reconstruction": {**SOLVER, "every": 2, "refit": 0, "reconstruct": Reconstruct(epochs=3, lr=2e-3)},
}
OFFICIAL = {"official": {}, "official, true sequential": {"sequential": True}}
LABELS = (*OFFICIAL, *OURS)


def run(
    setting: str, label: str, seed: int, work: Path, calibration: int = CALIBRATION, test: int = TEST
) -> dict[str, object]:
    """One run, from where an earlier one stopped."""
    folder = work / f"{setting}-{label}-{seed}".replace(" ", "_").replace("%", "")
    record = folder / "record.json"
    folder.mkdir(parents=True, exist_ok=True)
    if record.exists():
        return json.loads(record.read_text())
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    text = wikitext2("train")[: 6 * 3 * CALIBRATION * LENGTH]
    windows = token_windows(tokenizer, text, length=LENGTH, count=calibration, seed=seed)
    with torch.no_grad():
        make = _official if label in OFFICIAL else _ours
        seconds = make(model, windows, setting, label, folder)
        losses = _losses(model, token_windows(tokenizer, wikitext2("test"), length=LENGTH, count=test), folder)
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    row = {
        "setting": setting,
        "label": label,
        "seed": seed,
        "perplexity": math.exp(statistics.fmean(losses)),
        "losses": losses,
        "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "seconds": seconds,
    }
    _keep(record, row)
    return row


def _official(model: torch.nn.Module, windows: torch.Tensor, setting: str, label: str, folder: Path) -> float:
    group = {"group": (2, 4)} if setting == "2:4" else SETTINGS[setting]
    return official.prune_blocks(model, windows, folder, **group, **OFFICIAL[label])


def _ours(model: torch.nn.Module, windows: torch.Tensor, setting: str, label: str, folder: Path) -> float:
    clock = Clock(folder / "seconds.json")
    data = [{"input_ids": w[None], "use_cache": False} for w in windows]
    prune(model, data=data, workdir=folder / "blocks", progress=clock, **SETTINGS[setting], **OURS[label])
    return clock.total()


class Clock:
    """Processor seconds between one finished layer and the next, of the run that computed it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.spent: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
        self.last = time.process_time()

    def __call__(self, layer: str, done: int, total: int) -> None:
        now = time.process_time()
        self.spent.setdefault(layer, now - self.last)
        self.last = now
        _keep(self.file, self.spent)

    def total(self) -> float:
        """What all layers took, and what came after the last one."""
        return sum(self.spent.values()) + time.process_time() - self.last


def _losses(model: torch.nn.Module, windows: torch.Tensor, folder: Path) -> list[float]:
    file = folder / "losses.json"
    losses = json.loads(file.read_text()) if file.exists() else []
    for window in windows[len(losses) :]:
        losses.append(math.log(perplexity(model, window[None])))
        _keep(file, losses)
    return losses


def _keep(file: Path, what: object) -> None:
    with whole_file(file) as draft:
        draft.write_text(json.dumps(what))


def finished(work: Path) -> list[dict[str, object]]:
    """All complete runs, in the order of the settings and labels above."""
    rows = [json.loads(f.read_text()) for f in work.glob("*/record.json")]
    return sorted(rows, key=lambda r: (list(SETTINGS).index(r["setting"]), LABELS.index(r["label"]), r["seed"]))


def cells(rows: list[dict[str, object]]) -> list[tuple[str, ...]]:
    """A line per setting and label: best and spread over seeds, against the better official order of the same seeds."""
    lines = []
    for setting in SETTINGS:
        by_label = {
            name: {r["seed"]: r for r in rows if (r["setting"], r["label"]) == (setting, name)} for name in LABELS
        }
        for name, runs in by_label.items():
            if not runs:
                continue
            found = [r["perplexity"] for r in runs.values()]
            rivals = [by_label[o][s] for o in OFFICIAL for s in runs if s in by_label[o]]
            best = min(rivals, key=lambda r: r["perplexity"], default=None)
            seconds = statistics.median(r["seconds"] for r in runs.values())
            lines.append(
                (
                    setting,
                    name,
                    f"{min(found):.2f}",
                    f"{min(found):.2f} to {max(found):.2f} ({len(found)})",
                    f"{min(found) / best['perplexity'] - 1:+.1%}" if best and name in OURS else "",
                    f"{next(iter(runs.values()))['zeros']:.2%}",
                    f"{seconds:.0f}",
                    f"{seconds / best['seconds']:.2f}" if best else "",
                )
            )
    return lines


def stopped(work: Path, rows: list[dict[str, object]]) -> list[str]:
    """A line for every run that was stopped among the test windows, with complete ones on the same windows."""
    lines = []
    for file in sorted(work.glob("*/losses.json")):
        if (file.parent / "record.json").exists():
            continue
        losses, (setting, name, seed) = json.loads(file.read_text()), file.parent.name.replace("_", " ").split("-")
        beside = {
            r["label"]: r["losses"] for r in rows if (str(r["setting"]).rstrip(" %"), str(r["seed"])) == (setting, seed)
        }
        there = {name: losses, **{label: found[: len(losses)] for label, found in beside.items()}}
        figures = ", ".join(f"{label} {math.exp(statistics.fmean(found)):.2f}" for label, found in there.items())
        lines.append(
            f"{setting}, {name}, seed {seed} stopped after {len(losses)} of {TEST} test windows; on these: {figures}."
        )
    return lines


HEADS = (
    "setting", "recipe", "best perplexity", "spread (seeds)", "against official", "zeros", "processor s", "× official",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run: a check that it runs, not a result")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of finished and unfinished runs")
    parser.add_argument("--only", nargs="+", metavar="SETTING:LABEL:SEED", help="these runs; 'none': only the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of calibration windows")
    parser.add_argument("--write", action="store_true", help="write the results beside the others")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            print(run("2:4", LABELS[-1], 0, Path(folder), calibration=2, test=1)["perplexity"])
        return
    wanted = [(s, n, i) for i in options.seeds for s in SETTINGS for n in LABELS]
    if options.only:
        split = [w.rsplit(":", 2) for w in options.only if w != "none"]
        wanted = [(s, n, int(i)) for s, n, i in split]
    for setting, label, seed in wanted:
        row = run(setting, label, seed, options.work)
        line = f"{setting}, {label}, seed {seed}: perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s"
        print(line, file=sys.stderr, flush=True)
    rows = finished(options.work)
    print(table(HEADS, cells(rows)))
    if options.write:
        record, notes = {"rows": rows, "calibration": CALIBRATION, "test": TEST}, [*NOTES, *stopped(options.work, rows)]
        write_results("oneshot", record, HEADS, cells(rows), notes)


NOTES = [
    f"{CALIBRATION} calibration windows of {LENGTH} tokens (WikiText-2 train), drawn by the seed and the same for all; "
    f"perplexity over the first {TEST} windows of {LENGTH} tokens of WikiText-2 test. Embeddings and head stay dense.",
    "Official: SparseGPT's procedure (benchmarks/oneshot/official.py), damping 0.01; 'true sequential' is its flag. "
    "'Against official' takes the better of its orders among those that were run, over the same seeds.",
    "Seconds: of the processor, one thread, calibration's forward passes included, evaluation left out; runs may "
    "have gone on in pieces, beside other work.",
    f"Ours: {OURS}.",
]

if __name__ == "__main__":
    main()
