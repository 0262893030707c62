"""A tiny problem for the harness's own tests: sums of rows."""

import numpy as np

from benchmarks.harness import Case

NAME, TITLE, TOLERANCE = "fake", "Sums of rows", 1e-6
CASES = [Case(f"{n}-{d}", {"size": n, "density": d}) for n in (8, 16) for d in (0.5, 0.25)]
GROUPS = {"best dense": ("dense", "dense_but_wrong")}
MEASURES = {"bytes": "weights, bytes"}
PANEL = ("size",)


def dense_case(case):
    return f"{case.labels['size']}-0.5"


def build(case):
    n = case.labels["size"]
    return np.arange(n * n, dtype=np.float64).reshape(n, n)


def exact(case, data):
    return data.sum(1)


def work(case, data):
    return {"flops": data.size * case.labels["density"], "bytes": data.nbytes}


def export(case, data, folder):
    np.save(folder / "x.npy", data)
