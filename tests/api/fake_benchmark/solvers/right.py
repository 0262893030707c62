"""Right; leaves a line for every case it prepares where a test asks for it; prints, which must not disturb replies."""

import os

from benchmarks.harness import Prepared

SPARSE = True


def prepare(data, threads):
    if log := os.environ.get("FAKE_BENCHMARK_LOG"):
        with open(log, "a") as file:
            file.write(f"{len(data)}\n")
    print("engines print what they like")
    return Prepared(lambda: None, check=lambda: data.sum(1), measures=lambda: {"bytes": data.nbytes})
