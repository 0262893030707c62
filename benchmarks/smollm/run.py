"""SmolLM2-135M at 50 % zeros: perplexity, time and peak memory of every method, and of the official procedures.

Each method runs in a process of its own, so that one's memory is not another's. All read the same calibration windows.

    python -m benchmarks.smollm.run [--quick]
    python -m benchmarks.smollm.run --draws 0 1 2 3  # perplexities of other calibration windows
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results import table, write_results

CALIBRATION, TEST, LENGTH = 16, 24, 1024
METHODS = {
    "dense": None,
    "magnitude": dict(method="magnitude", density=0.5),
    "wanda": dict(method="wanda", density=0.5),
    "wanda, official procedure": "wanda",
    "sparsegpt": dict(method="sparsegpt", density=0.5),
    "sparsegpt, official procedure": "sparsegpt",
    "wanda 2:4": dict(method="wanda", pattern="2:4"),
    "sparsegpt 2:4": dict(method="sparsegpt", pattern="2:4"),
    "sparsegpt, rows by 4": dict(method="sparsegpt", density=0.5, pattern="([o] {4}) [i]"),
    "wanda, weights on disk": dict(method="wanda", density=0.5, offload=True),
    "sparsegpt, weights on disk": dict(method="sparsegpt", density=0.5, offload=True),
}


PAIRS = (("wanda", "wanda, official procedure"), ("sparsegpt", "sparsegpt, official procedure"))


def work(name: str, calibration: int, test: int, seed: int = 0) -> dict[str, object]:
    """One method in this process."""
    import gossamer
    from benchmarks.smollm import official
    from gossamer.data import load_model, load_tokenizer, perplexity, token_windows, wikitext2

    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    text = wikitext2("train")[: 6 * 3 * calibration * LENGTH]
    windows = token_windows(tokenizer, text, length=LENGTH, count=calibration, seed=seed)
    spec, began = METHODS[name], time.perf_counter()
    base = _reset_peak()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if isinstance(spec, str):
            official.prune_blocks(model, windows, spec)
        elif spec is not None:
            offload = {"workdir": folder, "offload": True} if spec.get("offload") else {}
            options = {k: v for k, v in spec.items() if k not in ("offload", "method")}
            data = [{"input_ids": w[None], "use_cache": False} for w in windows]
            gossamer.prune(model, spec["method"], data=data, **options, **offload)
        seconds, peak = time.perf_counter() - began, _peak()
        zeros = [int((m.weight == 0).sum()) for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
        sizes = [m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
        held_out = token_windows(tokenizer, wikitext2("test"), length=LENGTH, count=test)
        losses = [math.log(perplexity(model, window[None])) for window in held_out]
        return {
            "method": name,
            "perplexity": math.exp(statistics.fmean(losses)),
            "losses": losses,
            "zeros": sum(zeros) / sum(sizes),
            "seconds": seconds,
            "peak_mb": peak,
            "before_mb": base,
        }


def alone(name: str, *arguments: str) -> dict[str, object]:
    """`work` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.smollm.run", "--only", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: perplexity {row['perplexity']:.2f}, {row['seconds']:.0f} s", file=sys.stderr)
    return row


def draws(seeds: list[int], quick: bool) -> None:
    """Ours beside the official procedure for several draws of calibration windows."""
    rows = []
    for ours, official in PAIRS:
        for seed in seeds:
            arguments = ("--seed", str(seed), *(["--quick"] * quick))
            a, b = alone(ours, *arguments), alone(official, *arguments)
            apart = [x - y for x, y in zip(a["losses"], b["losses"])]
            error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
            pair = {"ours": a["perplexity"], "official": b["perplexity"]}
            rows.append({"method": ours, "seed": seed, **pair, "difference": statistics.fmean(apart), "error": error})
    heads = ("method", "draw", "ours", "official", "difference of the mean loss", "standard error")
    cells = [(r["method"], str(r["seed"]), *(f"{r[k]:.2f}" for k in ("ours", "official")), *signed(r)) for r in rows]
    notes = ["Perplexity at 50 % zeros; loss in nats per token, its standard error over the test windows, in pairs."]
    print(table(heads, cells))
    if not quick:
        write_results("smollm_draws", {"rows": rows}, heads, cells, notes)


def signed(row: dict[str, float]) -> tuple[str, str]:
    """A difference and its error, as a table shows them."""
    return f"{row['difference']:+.4f}", f"{row['error']:.4f}"


def _status(field: str) -> float:
    file = Path("/proc/self/status")
    if not file.exists():
        return math.nan
    return next(int(line.split()[1]) / 1024 for line in file.read_text().splitlines() if line.startswith(field))


def _reset_peak() -> float:
    """Resident memory now, in MB; the peak counter starts again from here (on Linux; elsewhere NaN)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few windows: a check that it runs, not a result")
    parser.add_argument("--only", help="one method, in this process; prints JSON")
    parser.add_argument("--seed", type=int, default=0, help="which calibration windows are drawn")
    parser.add_argument(
        "--draws", type=int, nargs="+", metavar="SEED", help="only compare with the official procedures"
    )
    options = parser.parse_args()
    calibration, test = (2, 1) if options.quick else (CALIBRATION, TEST)
    if options.only:
        print(json.dumps(work(options.only, calibration, test, options.seed)))
        return
    if options.draws:
        draws(options.draws, options.quick)
        return
    rows = [alone(name, *(["--quick"] * options.quick)) for name in METHODS]
    heads = ("method", "perplexity", "zeros", "seconds", "peak MB", "MB before")
    cells = [
        (
            r["method"],
            f"{r['perplexity']:.2f}",
            f"{r['zeros']:.1%}",
            f"{r['seconds']:.0f}",
            f"{r['peak_mb']:.0f}",
            f"{r['before_mb']:.0f}",
        )
        for r in rows
    ]
    notes = [
        f"{calibration} calibration windows of {LENGTH} tokens (WikiText-2 train, seed 0), the same for all; "
        f"perplexity over the first {test} windows of {LENGTH} tokens of WikiText-2 test.",
        "Peak MB: highest resident memory while pruning, model included; 'weights on disk' counts the page cache that "
        "holds mapped weights, which the system may take back.",
        "Official procedure: benchmarks/smollm/official.py, block by block as the papers' repositories do.",
    ]
    print(table(heads, cells))
    if not options.quick:
        write_results("smollm", {"rows": rows, "calibration": calibration, "test": test}, heads, cells, notes)


if __name__ == "__main__":
    main()
