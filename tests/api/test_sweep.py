"""sweep: the grid is what was asked for, a killed sweep goes on exactly, and the table counts right."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import scipy.stats

from gossamer.core.errors import GossamerError, MissingDependency, TargetError, UnknownName
from gossamer.data.tasks import task
from gossamer.integrations import sweep
from gossamer.integrations.sweeps import gathered
from gossamer.recipes.grid import grid
from gossamer.recipes.trained import read_trained
from gossamer.report.sweep import HEADS, Interval, T
from gossamer.report.sweep_figure import write_sweep_figure

ROOT = Path(__file__).parents[2]
ONE_SHOT = {"method": "magnitude", "name": "one shot", "first": 0.25}
SMALL = {
    "tasks": ["teacher"],
    "methods": ["dense", {"method": "rigl", "options": {"every": 4}}, ONE_SHOT],
    "densities": [0.2, 0.1],
    "seeds": 2,
    "steps": 40,
    "batch": 32,
}


def test_the_grid_is_the_product_and_shares_first_parts(tmp_path):
    jobs = grid(SMALL, tmp_path, task)
    assert len(jobs) == 2 * (1 + 2 + 2 + 1) == len({j.name for j in jobs})
    assert [j.plan.seed for j in jobs] == [0] * 6 + [1] * 6  # seed by seed
    shot = next(j for j in jobs if j.name == "teacher/one-shot-0.1-seed1")
    first = next(j for j in jobs if j.name == shot.after)
    assert (first.plan.method, first.plan.steps, first.label) == ("dense", 10, "") and jobs.index(first) < jobs.index(
        shot
    )
    assert (shot.plan.steps, shot.plan.density, shot.plan.seed) == (30, 0.1, 1)
    assert shot.plan.start == str(tmp_path / "runs" / first.name)
    assert all(j.plan.batch == 32 and j.plan.rate == task("teacher").rate for j in jobs)


def test_tasks_and_methods_have_keys_of_their_own(tmp_path):
    rigl = {"method": "rigl", "tasks": {"teacher": {"skip": ["4"]}}}
    fixed = {"method": "sr_ste", "densities": [], "tasks": {"clothes-cnn": None}}
    asked = {
        "tasks": [{"task": "teacher", "steps": 7, "densities": [0.3]}, "clothes-cnn"],
        "methods": [rigl, fixed],
        "densities": [0.5, 0.1],
        "seeds": [4],
        "rate": 0.5,
    }
    jobs = {j.name: j.plan for j in grid(asked, tmp_path, task)}
    assert set(jobs) == {
        "teacher/rigl-0.3-seed4",
        "teacher/sr-ste-seed4",
        "clothes-cnn/rigl-0.5-seed4",
        "clothes-cnn/rigl-0.1-seed4",
    }
    on, off = jobs["teacher/rigl-0.3-seed4"], jobs["clothes-cnn/rigl-0.1-seed4"]
    assert (on.skip, on.steps, on.rate) == (("4",), 7, 0.5) and (off.skip, off.steps) == ((), task("clothes-cnn").steps)
    assert jobs["teacher/sr-ste-seed4"].density is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": []}, "one entry or more"),
        ({"tasks": ["techer"]}, "'teacher'"),
        ({"methods": ["rigll"]}, "'rigl'"),
        ({"methods": "dense"}, "a list"),
        ({"methods": [{"name": "x"}]}, "method:"),
        ({"methods": ["rigl", "rigl"]}, "asked for twice"),
        ({"methods": ["rigl", {"method": "rigl", "options": {"every": 3}}]}, "name: of its own"),
        ({"methods": [ONE_SHOT, {**ONE_SHOT, "name": "slow", "rate": 1e-5}]}, "the same keys, or another first:"),
        ({"methods": [{"method": "rigl", "first": 2}]}, "between 0 and 1"),
        ({"methods": [{"method": "rigl", "tasks": {"teacher": 3}}]}, "mapping of recipe keys"),
        ({"densities": [0.0]}, "up to 1"),
        ({"densities": 0.1}, "a list"),
        ({"seeds": 0}, "count from 1"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"stesp": 3}, "'steps'"),
    ],
)
def test_what_a_sweep_cannot_say_is_refused_before_anything_is_trained(change, said, tmp_path):
    with pytest.raises((GossamerError, UnknownName), match=said):
        sweep({**SMALL, **change}, tmp_path, workers=1)
    assert not list(tmp_path.iterdir())


def test_the_rows_are_means_over_the_runs(tmp_path):
    told = []
    found = sweep(SMALL, tmp_path, workers=1, tell=told.append)
    assert [(r.method, r.density) for r in found.rows] == [
        ("dense", None),
        ("rigl", 0.2),
        ("rigl", 0.1),
        ("one shot", 0.2),
        ("one shot", 0.1),
    ]
    dense, rigl, shot = found.rows[0], found.rows[2], found.rows[4]
    runs = [read_trained(tmp_path / "runs" / "teacher" / f"rigl-0.1-seed{s}") for s in (0, 1)]
    assert rigl.values == {s: run.score for s, run in enumerate(runs)}
    assert rigl.flops == sum(r.flops for r in runs) / 2 and rigl.share == pytest.approx(rigl.flops / dense.flops)
    assert dense.share == 1.0
    # A quarter of the steps dense, three quarters at one tenth of the weights.
    assert shot.share == pytest.approx(0.25 + 0.75 * shot.kept) and shot.kept == pytest.approx(0.1, abs=1e-3)
    assert not found.failures and not found.missing
    assert (told[-1].done, told[-1].total, told[-1].left) == (12, 12, 0) and told[-1].over[0].endswith("seed1")
    held = json.loads((tmp_path / "sweep.json").read_text())
    assert held["rows"][2]["mean"] == rigl.quality.mean and held["machine"]["cpu"]
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + 5 and all(line.count("|") == len(HEADS) + 1 for line in table)
    drawn = write_sweep_figure(found, tmp_path / "sweep.svg").read_text()
    ElementTree.fromstring(drawn)
    assert "one shot" in drawn and "prefers-color-scheme" in drawn


def test_a_stopped_sweep_repeats_nothing_and_ends_the_same(tmp_path):
    def stop(status):
        if status.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(SMALL, tmp_path / "a", workers=1, tell=stop)
    held = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("run.json")}
    assert len(held) == 4 and len(json.loads((tmp_path / "a" / "sweep.json").read_text())["missing"]) == 8
    unbegun = tmp_path / "a" / "runs" / "teacher" / "rigl-0.1-seed1"
    unbegun.mkdir()
    (unbegun / ".plan.json.x1").touch()  # killed while it wrote its first file
    again = sweep(SMALL, tmp_path / "a", workers=1)
    assert all(p.stat().st_mtime_ns == then for p, then in held.items())
    whole = sweep(SMALL, tmp_path / "b", workers=1)
    assert [r.values for r in again.rows] == [r.values for r in whole.rows]
    first = next((tmp_path / "b" / "runs" / "teacher").glob("first-*-seed0"))
    shutil.rmtree(first)  # what starts from it has lost a part of its cost, so it is in no row
    lost = gathered(grid(SMALL, tmp_path / "b", task), tmp_path / "b", {})
    assert {len(r.values) for r in lost.rows if r.method == "one shot"} == {1} and len(lost.missing) == 3
    more = sweep({**SMALL, "seeds": 3}, tmp_path / "a", workers=1)
    assert [len(r.values) for r in more.rows] == [3] * 5
    assert all(p.stat().st_mtime_ns == then for p, then in held.items())
    with pytest.raises(TargetError, match="steps = 40, now it is 50"):
        sweep({**SMALL, "steps": 50}, tmp_path / "a", workers=1)


def test_a_run_that_fails_leaves_the_others_alone(tmp_path):
    wild = {"method": "dense", "name": "wild", "rate": 1e30, "optimizer": "sgd"}
    # Moves every 100 steps do not fit into 40.
    stiff = {"method": "set", "options": {"every": 100}, "densities": [0.1]}
    after = {"method": "rigl", "name": "after wild", "first": 0.5, "rate": 1e30, "optimizer": "sgd", "densities": [0.1]}
    found = sweep({**SMALL, "methods": [wild, stiff, after, "dense"], "seeds": 1}, tmp_path, workers=1)
    assert [r.method for r in found.rows] == ["dense"]
    assert "lower rate" in found.failures["teacher/wild-seed0"] and "every=" in found.failures["teacher/set-0.1-seed0"]
    assert {"teacher/first-20-seed0", "teacher/after-wild-0.1-seed0"} <= set(found.failures)
    assert "failed: " in found.table()


def test_intervals_are_students():
    for n in range(2, 17):
        assert T[min(n - 2, len(T) - 1)] == pytest.approx(scipy.stats.t.ppf(0.975, n - 1), abs=1e-3)
    low, high = scipy.stats.t.interval(0.95, 2, loc=2, scale=scipy.stats.sem([1.0, 2.0, 3.0]))
    three = Interval.of([1.0, 2.0, 3.0])
    assert (three.mean, three.half) == (2.0, pytest.approx((high - low) / 2, rel=1e-3))
    assert Interval.of([5.0]) == Interval(5.0, None)
    assert three.text(".1f") == "2.0 ± 2.5" and Interval(5.0).text(".1f") == "5.0"


def test_several_workers_without_ray_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"gossamer\[sweep\]"):
        sweep(SMALL, tmp_path, workers=2)
    with pytest.raises(GossamerError, match="at least 1"):
        sweep(SMALL, tmp_path, workers=0)


# Ends itself by a signal as soon as a run that is not finished has a learning curve of so many lines.
PROGRAM = """
import json, os, sys
from pathlib import Path
from gossamer.integrations import pace, ray_workers, sweep
pace.EVERY = ray_workers.LOOK = 0.02  # fast machines train a run between two of the usual looks
out, workers, lines, how = Path(sys.argv[2]), *map(int, sys.argv[3:])
def tell(status):
    curves = [p for p in out.rglob("metrics.jsonl") if not (p.parent / "run.json").exists()]
    if any(len(p.read_text().splitlines()) > lines for p in curves):
        os.kill(os.getpid(), how)
sweep(json.loads(sys.argv[1]), out, workers=workers, tell=tell)
"""


def cut_short(asked: dict, out: Path, workers: int, lines: int, how: signal.Signals) -> None:
    """A sweep in a process of its own that does not live to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(asked), str(out), *map(str, (workers, lines, int(how)))]
    ended = subprocess.run(command, env=environment, capture_output=True, start_new_session=True, text=True)
    assert ended.returncode in (-how, 1, 130), ended.stderr
    assert how == signal.SIGKILL or "KeyboardInterrupt" in ended.stderr


def same_as_undisturbed(asked: dict, out: Path, whole: Path) -> list[int]:
    """Every run's figures are those of an undisturbed sweep; returns how often each was interrupted."""
    interruptions = []
    for file in sorted((out / "runs").rglob("run.json")):
        run, other = read_trained(file), read_trained(whole / file.relative_to(out))
        blank = {"seconds": 0, "processor_seconds": 0, "interruptions": 0, "plan": {}}
        assert replace(run, **blank) == replace(other, **blank)
        interruptions.append(run.interruptions)
    assert len(interruptions) == len(grid(asked, out, task))
    return interruptions


LONG = {**SMALL, "steps": 1600, "seeds": 1, "densities": [0.1], "save_every": 20}
# Long enough to be seen at work by Ray's parent.
SLOW = {**LONG, "methods": [{"method": "rigl", "options": {"every": 4}}, ONE_SHOT], "steps": 3000, "save_every": 100}


def test_a_killed_sweep_goes_on(tmp_path):
    whole = sweep(LONG, tmp_path / "whole", workers=1)
    cut_short(LONG, tmp_path / "cut", 1, 30, signal.SIGKILL)
    again = sweep(LONG, tmp_path / "cut", workers=1)
    assert [r.values for r in again.rows] == [r.values for r in whole.rows]
    assert sum(same_as_undisturbed(LONG, tmp_path / "cut", tmp_path / "whole")) == 1


def test_on_ray_ctrl_c_and_kill_9_lose_little_and_the_sweep_ends_the_same(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed; it is in the extra 'sweep'")
    sweep(SLOW, tmp_path / "whole", workers=1)
    for how, lines in ((signal.SIGINT, 10), (signal.SIGKILL, 50)):
        cut_short(SLOW, tmp_path / "cut", 2, lines, how)
        if how == signal.SIGINT:  # every run that was being trained has saved its last step
            for curve in tmp_path.glob("cut/runs/teacher/*/metrics.jsonl"):
                assert {"checkpoint.pt", "run.json"} & {p.name for p in curve.parent.iterdir()}
    wild = {"method": "rigl", "name": "wild", "first": 0.5, "rate": 1e30, "optimizer": "sgd"}
    found = sweep({**SLOW, "methods": [wild, *SLOW["methods"]]}, tmp_path / "cut", workers=2)
    assert "lower rate" in found.failures["teacher/first-1500-seed0"]
    assert "which it starts from, failed" in found.failures["teacher/wild-0.1-seed0"]
    # Workers may live on for a moment when their parent is killed, and finish what they do: that one need not count.
    assert sum(same_as_undisturbed(SLOW, tmp_path / "cut", tmp_path / "whole")) >= 1
