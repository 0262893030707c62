"""make bench: every benchmark, one after the other, never two at once. Results go to benchmarks/results/.

python -m benchmarks.run [select spmm smollm minilm]
"""

from __future__ import annotations

import os
import subprocess
import sys

# Quick ones first, so that a broken set-up shows early.
ALL = ("select", "spmm", "smollm", "minilm")


def main() -> int:
    chosen = sys.argv[1:] or ALL
    unknown = set(chosen) - set(ALL)
    if unknown:
        print(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    # A short spin between products, not the long default: what one engine leaves running is another's noise.
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000"}
    failed = [
        n for n in chosen if subprocess.run([sys.executable, "-m", f"benchmarks.{n}.run"], env=environment).returncode
    ]
    for name in failed:
        print(f"benchmark {name} failed; run python -m benchmarks.{name}.run to see why", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
