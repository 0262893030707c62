"""gossamer train and gossamer doctor compare, as their user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import record

from gossamer.core.errors import TargetError
from gossamer.recipes.trained import TrainedLayer, TrainedRun
from gossamer.report.fair import fairness

ROOT = Path(__file__).parents[2]
DENSE = {"task": "teacher", "steps": 30, "batch": 32}
RIGL = {**DENSE, "method": "rigl", "sparsity": 0.8, "options": {"every": 4}, "rate": "3e-3"}


def recipe(folder: Path, keys: dict, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(keys))
    return folder / name


def test_a_recipe_becomes_a_run_with_a_report(gossamer, tmp_path):
    file = recipe(tmp_path, RIGL)
    run = record(gossamer("train", file, "--json", "--set", "seed=3"))
    assert run["out"] == str(tmp_path / "recipe-run") and run["plan"]["seed"] == 3
    assert run["plan"]["density"] == pytest.approx(0.2) and run["plan"]["rate"] == 0.003
    page = Path(run["report"]).read_text()
    assert "<svg" in page and f"{run['quality']['accuracy']:.4f}" in page
    assert {"run.json", "metrics.jsonl", "model.safetensors"} <= {p.name for p in (tmp_path / "recipe-run").iterdir()}
    again = gossamer("train", file, "--set", "seed=3")
    assert again.exit_code == 0 and "of dense training's FLOPs" in again.stdout


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({**DENSE, "tsk": 1}, "'task'"),
        ({**DENSE, "steps": "many"}, "whole number"),
        ({**DENSE, "density": 0.5}, "keeps every weight"),
        ({**RIGL, "density": 0.5}, "same thing"),
        ({**RIGL, "method": "rigll"}, "'rigl'"),
        ({"task": "techer"}, "'teacher'"),
    ],
)
def test_what_a_recipe_cannot_say(gossamer, tmp_path, keys, said):
    result = gossamer("train", recipe(tmp_path, keys))
    assert result.exit_code == 3 and said in result.stderr
    assert gossamer("train", recipe(tmp_path, {**DENSE, "steps": 2})).exit_code == 0  # nothing is left in the way


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(gossamer, tmp_path):
    file = recipe(tmp_path, {**RIGL, "steps": 1000})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "gossamer", "train", str(file)], env=environment, stderr=subprocess.PIPE, text=True
    )
    curve = tmp_path / "recipe-run" / "metrics.jsonl"
    while child.poll() is None and not (curve.exists() and len(curve.read_text().splitlines()) > 5):
        pass
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 130 and "go on" in said
    run = record(gossamer("train", file, "--json"))
    assert run["interruptions"] == 1
    whole = record(gossamer("train", file, "--json", "--out", tmp_path / "whole"))
    assert whole["quality"] == run["quality"] and whole["curve"] == run["curve"]


def test_doctor_compares_two_runs(gossamer, tmp_path):
    for name, keys in (("rigl", RIGL), ("dense", DENSE)):
        assert gossamer("train", recipe(tmp_path, keys), "--out", tmp_path / name).exit_code == 0
    held = record(gossamer("doctor", "compare", tmp_path / "rigl", tmp_path / "dense", "--json"))
    verdicts = {a["question"]: a["verdict"] for a in held["answers"]}
    assert not held["fair"] and verdicts["same nonzeros?"] == verdicts["a dense baseline at equal cost?"] == "unfair"
    assert verdicts["tuned equally?"] == verdicts["unfair warm start?"] == "fair"
    drawn = gossamer("doctor", "compare", tmp_path / "rigl", tmp_path / "dense")
    assert drawn.exit_code == 0 and "speak against" in drawn.stdout
    assert gossamer("doctor", "compare", tmp_path / "rigl", tmp_path).exit_code == 3


def run_of(**changes: object) -> TrainedRun:
    plan = {"task": "t", "method": "rigl", "steps": 100, "batch": 10, "rate": 0.1, "optimizer": "sgd", "decay": 0.0}
    plan = {**plan, "tried": 1, "start": "", "seed": 0, **changes.pop("plan", {})}
    layers = (TrainedLayer("a", 10, 100, 10), TrainedLayer("b", 10, 100, 10))
    usual = {"title": "T", "quality": {"accuracy": 0.8}, "quality_label": "accuracy", "higher_is_better": True}
    counts = {"nonzeros": 20, "parameters": 200, "flops": 1000, "dense_flops": 10000, "start_flops": 0}
    rest = {"seconds": 1.0, "interruptions": 0, "churned": 0, "curve": (), "threads": 1, "layers": layers}
    return TrainedRun(**{"plan": plan, **usual, **counts, **rest, **changes})


def answer(a: TrainedRun, b: TrainedRun, question: str) -> tuple[str, str]:
    found = next(x for x in fairness(a, b) if question in x.question)
    return found.verdict, found.said


def test_each_question_is_answered_in_words():
    run = run_of()
    assert [a.verdict for a in fairness(run, run)].count("unfair") == 0
    assert answer(run, run_of(nonzeros=40), "nonzeros")[0] == "unfair"
    assert "the second keeps 2 times" in answer(run, run_of(nonzeros=40), "nonzeros")[1]
    assert answer(run, run_of(flops=1300), "FLOPs")[0] == "unfair"
    assert answer(run, run_of(plan={"steps": 200}), "training cost")[0] == "unfair"
    assert answer(run, run_of(plan={"rate": 0.2}), "tuned")[0] == "unknown"
    assert answer(run, run_of(plan={"tried": 9}), "tuned")[0] == "unfair"
    assert answer(run_of(plan={"tried": 9}), run_of(plan={"tried": 9, "rate": 1}), "tuned")[0] == "fair"
    assert answer(run, run_of(plan={"start": "x"}, start_flops=5), "warm start")[0] == "unfair"
    assert answer(run, run_of(start_flops=1000, plan={"start": "x"}), "training cost")[0] == "unfair"
    dead = (TrainedLayer("a", 0, 100, 10), TrainedLayer("b", 5, 100, 10, dead_outputs=8))
    verdict, said = answer(run, replace(run, layers=dead), "collapse")
    assert verdict == "unfair" and "a of the second keeps nothing" in said and "8 outputs without a link" in said
    with pytest.raises(TargetError, match="like with like"):
        fairness(run, run_of(plan={"task": "u"}))


def test_the_dense_baseline_is_asked_for_at_equal_cost():
    sparse, dense = run_of(), run_of(plan={"method": "dense"}, flops=10000)
    assert "at equal FLOPs it would train 10 steps" in answer(sparse, dense, "dense baseline")[1]
    assert answer(sparse, replace(dense, flops=1010), "dense baseline")[0] == "fair"
    assert answer(sparse, sparse, "dense baseline")[0] == "unknown"
    assert answer(dense, dense, "dense baseline")[0] == "fair"


def test_json_of_a_record_reads_back(tmp_path):
    from gossamer.recipes.trained import read_trained, write_trained

    write_trained(run_of(curve=((1, 0.5, 1.0),)), tmp_path / "run.json")
    assert read_trained(tmp_path) == run_of(curve=((1, 0.5, 1.0),))
    assert json.loads((tmp_path / "run.json").read_text())["schema"].startswith("gossamer-training")
