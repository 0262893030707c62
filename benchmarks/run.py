"""make bench: problems x solvers x measures, one problem after the other. See benchmarks/README.md.

python -m benchmarks.run [problem ...] [--quick] [--threads 1 2] [--only solver,...] [--cases prefix,...]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.harness.conventions import WAITING, Effort
from benchmarks.harness.problem import load, names

HERE = Path(__file__).parent


def scripts() -> tuple[str, ...]:
    """Benchmarks that are a script of their own (what they measure is not one function per solver)."""
    return tuple(sorted(p.parent.name for p in HERE.glob("*/run.py") if p.parent.name != "harness"))


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    there = (*names(), *scripts())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="problem", help=f"all unless given: {', '.join(there)}")
    parser.add_argument("--quick", action="store_true", help="short rounds of few cases; writes no results")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", type=_words, default=(), help="solvers, with commas between; writes no results")
    parser.add_argument("--cases", type=_words, default=(), help="beginnings of case ids; writes no results")
    parser.add_argument("--rounds", type=int, default=Effort.rounds)
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="measuring time per case and round")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on with a stopped run")
    parser.add_argument("--out", type=Path, help="write the results to this folder, whatever was left out")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(there):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    options.names = options.names or there
    return options


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def one(name: str, options: argparse.Namespace) -> bool:
    """Run one benchmark; True if it went well."""
    if name in scripts():
        command = [sys.executable, "-m", f"benchmarks.{name}.run", *(["--quick"] * options.quick)]
        return subprocess.run(command).returncode == 0
    from benchmarks.harness.run import Options, run

    asked = Options(
        quick=options.quick,
        threads=tuple(options.threads),
        only=options.only,
        cases=options.cases,
        effort=Effort(options.rounds, options.seconds),
        fresh=options.fresh,
        out=options.out,
    )
    return any(outcome.usable for outcome in run(load(name), asked))


def main(arguments: list[str] | None = None) -> int:
    """0 if all went well, 1 if one failed, 130 if stopped."""
    options = parsed(sys.argv[1:] if arguments is None else arguments)
    os.environ.update(WAITING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = []
    try:
        for name in options.names:
            try:
                well = one(name, options)
            except (ValueError, OSError) as error:
                print(error, file=sys.stderr)
                well = False
            failed += [] if well else [name]
    except KeyboardInterrupt:
        print("\nstopped; finished cases are kept: the same command goes on from them", file=sys.stderr)
        return 130
    for name in failed:
        print(f"benchmark {name} failed", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
