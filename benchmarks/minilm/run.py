"""The frontier of grouped MiniLM: accuracy against speed, 30 to 90 % zeros, with a recovery that no clock cuts short.

The same steps as `gossamer demo`, more settings. About a quarter of an hour on two cores.

    python -m benchmarks.minilm.run [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.results import table, write_results
from gossamer.demos.minilm import PROBE, ROWS, Plan, run
from gossamer.report import compare

STEPS = 400
PLANS = (
    Plan("rows by 4, 30 % zeros", ROWS, 0.7),
    Plan("rows by 4, 50 % zeros", ROWS, 0.5),
    *(Plan(f"rows by 4, {z} % zeros, recovered", ROWS, 1 - z / 100, STEPS) for z in (70, 80, 90)),
    Plan("unstructured 80 % zeros, recovered", "[o i]", 0.2, STEPS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two settings, short: a check that it runs, not a result")
    quick = parser.parse_args().quick
    plans = [replace(p, steps=min(p.steps, 5)) for p in PLANS[1:3]] if quick else PLANS
    with tempfile.TemporaryDirectory() as folder:
        measured = run(
            Path(folder), seconds=120 if quick else 6 * 900, measure_seconds=None if quick else 120, plans=plans
        )
    heads = (
        "setting",
        "accuracy",
        "points",
        "agrees",
        "disk MB",
        "threads",
        "sentences/s",
        "ms, one",
        "vs best dense fp32",
    )
    cells = []
    for r in measured.engines:
        s = measured.setting(r.setting)
        own = (s.name, f"{s.score:.2%}", f"{100 * (s.score - measured.dense.score):+.2f}")
        agrees = "" if s.agreement is None else f"{s.agreement:.1%}"
        times = compare.speedup(measured, r)
        name = own[0] if r.engine == "gossamer" else f"{own[0]}: {r.engine.removeprefix('gossamer, ')}"
        cells.append(
            (
                name,
                *own[1:],
                agrees,
                f"{s.bytes_disk / 1e6:.1f}",
                str(r.threads),
                f"{r.throughput:.0f}",
                f"{r.latency_ms:.2f}",
                "–" if times is None else f"{times:.2f}×",
            )
        )
    print(table(heads, cells))
    if not quick:
        write_results("minilm", {"metric": PROBE, **asdict(measured)}, heads, cells, measured.notes)


if __name__ == "__main__":
    main()
