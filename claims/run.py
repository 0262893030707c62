"""Run the claims: python -m claims.run [p036 ...] [--full]. A failed claim is a result, so the exit code stays 0."""

from __future__ import annotations

import argparse
import importlib
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import __version__ as torch_version
from torch import get_num_threads as threads

from gossamer.core.files import whole_file
from gossamer.report.machine import hardware, slug

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Result:
    """One claim's row. verdict: "holds", "fails" or "broken" (it did not run to the end)."""

    row: str
    claim: str
    paper: str
    ours: dict[str, object]
    rule: str
    verdict: str
    seconds: float
    threads: int


def names() -> list[str]:
    """Every claim there is, by its file's name."""
    return sorted(p.stem for p in HERE.glob("p[0-9]*.py"))


def run(name: str, *, full: bool) -> Result:
    """Run one claim; an exception becomes the verdict "broken", so that one claim cannot hide the others."""
    claim = importlib.import_module(f"claims.{name}")
    began = time.perf_counter()
    try:
        outcome = claim.run(full)
    except Exception:
        trace = {"error": traceback.format_exc(limit=3)}
        return Result(name, claim.CLAIM, claim.PAPER, trace, "", "broken", time.perf_counter() - began, threads())
    verdict = "holds" if outcome.verdict else "fails"
    seconds = time.perf_counter() - began
    return Result(name, claim.CLAIM, claim.PAPER, dict(outcome.ours), outcome.rule, verdict, seconds, threads())


def show(result: Result) -> str:
    """A result as Markdown."""
    ours = "\n".join(f"  - {k}: {v}" for k, v in result.ours.items())
    return (
        f"### {result.row}: {result.verdict}\n\n{result.claim}\n\n- paper: {result.paper}\n- ours:\n{ours}\n"
        f"- rule: {result.rule}\n- took {result.seconds:.0f} s on {result.threads} threads\n"
    )


def write(results: Sequence[Result], folder: Path, *, full: bool) -> None:
    """Results beside the hardware's name, as JSON and Markdown; rows not run now stay as they were."""
    stem = folder / f"{slug()}-{'full' if full else 'short'}"
    path = stem.with_suffix(".json")
    rows = {r["row"]: r for r in json.loads(path.read_text())["rows"]} if path.exists() else {}
    rows |= {r.row: asdict(r) for r in results}
    record = {"machine": hardware(), "torch": torch_version, "full": full}
    with whole_file(path) as draft:
        draft.write_text(json.dumps({**record, "rows": [rows[n] for n in sorted(rows)]}, indent=1) + "\n")
    head = f"# Claims on {hardware()['cpu']}, {'full' if full else 'short'}\n\n"
    with whole_file(stem.with_suffix(".md")) as draft:
        draft.write_text(head + "\n".join(show(Result(**rows[n])) for n in sorted(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the claims of the papers in miniature.")
    parser.add_argument("claims", nargs="*", choices=[*names(), []], help="which; all by default")
    parser.add_argument("--full", action="store_true", help="longer runs, more seeds")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    results = []
    for name in options.claims or names():
        results.append(run(name, full=options.full))
        print(show(results[-1]), flush=True)
    write(results, options.out, full=options.full)


if __name__ == "__main__":
    main()
