"""A checkpoint several times larger than an enforced memory limit, pruned from its shards.

Each way runs in a process of its own under the same allowance: the model loaded whole, which is expected to fail, and
block by block from the shards with activations spooled to disk.

    python -m benchmarks.larger_than_memory.run --folder SCRATCH  # 9 GB of disk
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.larger_than_memory.checkpoint import Size, write
from benchmarks.results import write_results

MIB = 2**20
WAYS = ("whole", "on disk, spooled")
RUN = {"method": "wanda", "allowance": 512 * MIB, "count": 2, "length": 128, "keep": MIB}
HEADS = ("way", "ended", "limit", "of it libraries", "checkpoint / limit", "most VmData", "resident above start", "s")


def one(way: str, folder: Path, **how: object) -> dict[str, object]:
    """A way in a child; what it says on its last line."""
    asked = json.dumps({"way": way, "folder": str(folder), **how})
    command = [sys.executable, "-m", "benchmarks.larger_than_memory.limited", asked]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # each thread's arena would count 64 MiB that nobody uses
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        return json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"way": way, "failed": f"exit {ended.returncode}: {ended.stderr.strip()[-300:]}"}


def row(found: Mapping[str, object], total: int) -> tuple[str, ...]:
    """For the table."""
    mib = lambda key: f"{found[key] / MIB:,.0f} MiB" if key in found else "–"  # type: ignore[operator]
    ended = f"no: {found['failed']}" if "failed" in found else f"yes, density {found['density']:.3f}"
    times = f"{total / found['limit']:.1f}" if "limit" in found else "–"  # type: ignore[operator]
    seconds = f"{found.get('seconds', 0):.0f}"
    return (
        *(str(found["way"]), ended, mib("limit"), mib("libraries"), times),
        *(mib("most_vmdata"), mib("grown"), seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    folder, size = parser.parse_args().folder, Size()
    total = write(folder / "dense", size)
    rows = [one(way, folder, **RUN) for way in WAYS]
    block, tokens = total / size.layers, RUN["count"] * RUN["length"]  # type: ignore[operator]
    notes = (
        f"`{RUN['method']}`, density 0.5, a Llama of {size.layers} layers with random weights in float32: "
        f"{total / MIB:,.0f} MiB in shards, {block / MIB:.0f} MiB per block; {tokens} calibration tokens, "
        f"{tokens * size.width * 4 / MIB:.0f} MiB per residual stream; one thread.",
        f"limit: RLIMIT_DATA, set to the VmData of the loaded libraries + {RUN['allowance'] // MIB} MiB.",  # type: ignore[operator]
        "resident above start: VmHWM − VmRSS before the model, mapped pages of files included.",
        f"spooled: {RUN['keep'] // MIB} MiB of activations stay in memory.",  # type: ignore[operator]
    )
    record = {"checkpoint_bytes": total, "run": RUN, "layers": size.layers, "ways": rows}
    print(write_results("larger_than_memory", record, HEADS, [row(r, total) for r in rows], notes).read_text())


if __name__ == "__main__":
    main()
