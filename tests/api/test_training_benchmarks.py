"""benchmarks/training: its configurations ask for the same methods, stopping keeps what is there, bytes are counted."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime, timedelta

import pytest
import torch

from benchmarks.training import bytes as counting
from benchmarks.training import run as benchmark
from gossamer.data.tasks import task
from gossamer.recipes.grid import grid


@pytest.mark.parametrize("config", ["short", "night", "gpu"])
def test_every_configuration_is_a_grid_of_the_same_methods(config, tmp_path):
    jobs = grid(benchmark.protocol(config), tmp_path, task)
    short = grid(benchmark.protocol("short"), tmp_path, task)
    assert {(j.plan.task, j.label) for j in jobs} == {(j.plan.task, j.label) for j in short}
    assert {j.plan.device for j in jobs} == {"cuda" if config == "gpu" else "cpu"}
    for name in {j.plan.task for j in jobs}:
        whole = {j.plan.steps for j in jobs if j.plan.task == name and j.label and not j.after}
        assert len(whole) == 1  # equal steps for all, also with a first part:
        firsts = {j.name: j.plan.steps for j in jobs if not j.label}
        assert {j.plan.steps + firsts[j.after] for j in jobs if j.plan.task == name and j.after} == whole


def test_what_is_there_at_the_deadline_is_written(tmp_path, monkeypatch):
    asked = {"tasks": ["teacher"], "methods": ["dense", "static"], "densities": [0.2], "seeds": 2, "steps": 20}
    begun = iter([None, datetime.now(UTC) - timedelta(seconds=1)])
    monkeypatch.setattr(benchmark, "deadline", lambda text: next(begun))
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmark, "write_results", lambda *a, **k: write(*a, **k, folder=tmp_path))
    options = argparse.Namespace(until="", workers=1, threads=1)
    cut = benchmark.trained({**asked, "seeds": 1}, tmp_path / "runs", options)
    cut = benchmark.trained(asked, tmp_path / "runs", options)
    assert [len(r.values) for r in cut.rows] == [1, 1] and len(cut.missing) == 2
    page = benchmark.write(cut, "short", asked).read_text()
    assert "2 runs, 2 not reached" in page
    held = json.loads(next(tmp_path.glob("training-short-*.json")).read_text())
    assert held["asked"] == asked and len(held["rows"]) == 2
    assert next(tmp_path.glob("training-short-*.svg")).read_text().startswith("<svg")


def write(*arguments, **named):
    from benchmarks.results import write_results

    return write_results(*arguments, **named)


def test_bytes_are_those_of_the_tensors():
    line = counting.measure("static", 64)
    assert (line.weights, line.masks, line.gradients) == (4.0, 1.0, 4.0)
    assert line.slots == pytest.approx(8, abs=0.01) and line.own < 0.1
    # Masked weights of the forward pass are made anew in every step, beside all that rests and the gradients.
    assert line.rest + line.gradients < line.peak < counting.measure("rigl", 64).peak
    sparse = counting.measure("static", 64, "sparse")
    assert sparse.weights == pytest.approx(0.4, rel=0.01)


def test_the_peak_is_that_of_storages_alive_at_once():
    with counting.Alive(100) as alive:
        x = torch.zeros(100, dtype=torch.uint8)
        y = x.view(10, 10) + 1
        assert alive.now == 300  # a view is no new storage
        del x
        z = y.clone()
    assert (alive.now, alive.most) == (300, 300) and z.numel() == 100
