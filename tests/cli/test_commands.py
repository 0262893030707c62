"""The command line as its user meets it: help, JSON, and exit codes that mean something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from gossamer.cli import codes
from gossamer.cli import doctor as doctor_module
from gossamer.core.errors import AssetError, FileDamaged, MissingDependency, PatternError

COMMANDS = (
    "demo",
    "prune",
    "pack",
    "train",
    "sweep",
    "bench",
    "report",
    "methods",
    "assets",
    "cache",
    "warmup",
    "doctor",
)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(gossamer, command):
    result = gossamer(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_help_documents_the_exit_codes(gossamer):
    text = " ".join(gossamer("--help").stdout.split())
    assert all(command in text for command in COMMANDS)
    for code in ("0 done", "1 unexpected", "2 wrong usage", "3 an input", "4 the environment", "130 stopped"):
        assert code in text


def test_python_dash_m_runs_and_shell_completion_is_offered():
    # Typer finds the shell among this process's parents; where tests run there may be none.
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "gossamer", "--show-completion", "bash"]
    run = subprocess.run(command, cwd=ROOT, env=named, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "_GOSSAMER_COMPLETE" in run.stdout


def test_an_unknown_method_names_near_ones_and_ends_with_3(gossamer, tmp_path):
    result = gossamer("prune", "minilm", "--method", "wnda", "--out", tmp_path / "o")
    assert result.exit_code == 3
    assert "'wanda'" in result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert not (tmp_path / "o").exists()


def test_methods_explains_one_and_refuses_an_unknown_one(gossamer):
    assert "Frantar" in gossamer("methods", "sparsegpt").stdout
    assert gossamer("methods", "sparsegpd").exit_code == 3


def test_an_unknown_model_names_near_assets(gossamer, tmp_path):
    result = gossamer("prune", "minilmm", "--method", "magnitude", "--out", tmp_path / "o")
    assert result.exit_code == 3
    assert "'minilm'" in result.stderr


@pytest.mark.parametrize("args", [("prune", "minilm"), ("prune", "x", "--sparsity", "lots"), ("nothing",), ("pack",)])
def test_wrong_usage_ends_with_2(gossamer, args):
    assert gossamer(*args).exit_code == 2


def test_json_is_the_whole_of_stdout(gossamer):
    methods = json.loads(gossamer("methods", "--json").stdout)
    assert {"wanda", "sparsegpt", "magnitude"} <= {m["name"] for m in methods}
    assert next(m for m in methods if m["name"] == "sparsegpt")["options"]["damping"] == 0.01
    one = json.loads(gossamer("methods", "wanda", "--json").stdout)
    assert one["needs"] == ["input_norm"]
    assets = json.loads(gossamer("assets", "--json").stdout)
    assert assets == json.loads(gossamer("assets", "list", "--json").stdout)
    assert {"minilm", "wikitext2"} <= {a["name"] for a in assets}


def test_doctor_finds_nothing_broken_here(gossamer):
    result = gossamer("doctor", "--json")
    held = json.loads(result.stdout)
    assert result.exit_code == 0, held
    assert held["ok"]
    assert {"python", "torch", "kernel spmm", "disk"} <= {f["what"] for f in held["findings"]}


def test_doctor_ends_with_4_and_says_what_to_do(gossamer, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(file / "cache"))
    result = gossamer("doctor", "--json")
    assert result.exit_code == 4
    broken = [f for f in json.loads(result.stdout)["findings"] if f["status"] == "broken"]
    assert [f["what"] for f in broken] == ["cache for measured times", "cache for assets"]
    assert "GOSSAMER_CACHE_DIR" in broken[0]["advice"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("odd"), 1),
        (PatternError("does not fit"), 3),
        (FileDamaged("bent"), 3),
        (AssetError("no network"), 4),
        (MissingDependency("no library"), 4),
        (OSError(28, "No space left on device"), 4),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 4),
        (OSError(2, "No such file or directory"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_code_and_no_traceback(gossamer, monkeypatch, error, code):
    def fail():
        raise error

    monkeypatch.setattr(doctor_module, "examine", fail)
    result = gossamer("doctor", "--json")
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert str(error) in result.stderr


def test_a_traceback_is_shown_when_asked_for(gossamer, monkeypatch):
    def fail():
        raise PatternError("does not fit")

    monkeypatch.setattr(doctor_module, "examine", fail)
    monkeypatch.setenv("GOSSAMER_TRACEBACK", "1")
    result = gossamer("doctor")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr


def test_a_full_disk_behind_one_of_our_errors_is_the_environment(gossamer, monkeypatch):
    def fail():
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise FileDamaged("could not be written") from error

    monkeypatch.setattr(doctor_module, "examine", fail)
    assert gossamer("doctor").exit_code == 4


@pytest.mark.parametrize(
    ("command", "says"),
    [("prune", "go on from there"), ("assets", "fetched whole"), ("demo", "anew"), ("pack", "anew")],
)
def test_what_ctrl_c_keeps_is_said_for_each_command(capsys, command, says):
    codes._say(KeyboardInterrupt(), command)
    told = " ".join(capsys.readouterr().err.split())
    assert says in told
    assert ("go on from there" in told) == (command == "prune")


def test_the_download_that_demo_announces_is_what_its_assets_weigh(gossamer):
    from gossamer.data import asset

    def megabytes(*names: str) -> int:
        return round(sum({a.filename: a.size for a in (asset(n).archive for n in names)}.values()) / 1e6)

    text = " ".join(gossamer("demo", "--help").stdout.split())
    assert f"{megabytes('minilm', 'movie-reviews')} MB" in text
    assert f"llm: {megabytes('smollm2-135m', 'wikitext2')} MB" in text


def test_assets_of_unknown_names_are_refused_before_any_work(gossamer):
    for verb in ("fetch", "verify", "remove"):
        result = gossamer("assets", verb, "minilmm")
        assert result.exit_code == 3
        assert "'minilm'" in result.stderr


def test_an_asset_can_be_verified_and_removed(gossamer, tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path))
    assert gossamer("assets", "verify", "minilm").exit_code == 4
    assert json.loads(gossamer("assets", "remove", "minilm", "--json").stdout) == {"minilm": False}
    (tmp_path / "assets" / "minilm").mkdir(parents=True)
    assert json.loads(gossamer("assets", "remove", "minilm", "--json").stdout) == {"minilm": True}
    assert not (tmp_path / "assets" / "minilm").exists()


def test_report_makes_the_page_again(gossamer, tmp_path):
    from gossamer.report import EngineRow, Run, Setting, write_run

    settings = [
        Setting("dense", {"accuracy": 0.8}, "accuracy", 1.0, 100, 100, 1.0, 0.0),
        Setting("half", {"accuracy": 0.7}, "accuracy", 0.9, 50, 50, 0.5, 1.0),
    ]
    engines = [EngineRow(s.name, "torch", 1, 2.0, 0.2, 500.0, "texts/s") for s in settings]
    write_run(Run("a model", {}, {}, settings, engines), tmp_path / "in" / "run.json")
    result = gossamer("report", tmp_path / "in" / "run.json", "--out", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.stderr
    assert "−10.0 points of accuracy" in json.loads(result.stdout)["headline"]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert gossamer("report", tmp_path / "page.html").exit_code == 3


def test_demo_prints_the_table_writes_the_page_and_shows_how_to_load(gossamer, tmp_path, monkeypatch):
    from types import ModuleType

    from gossamer.report import EngineRow, Run, Setting

    asked = {}

    def run(out, *, seconds, progress):
        asked.update(out=out, seconds=seconds)
        progress("working", 1, 2)
        settings = [
            Setting("dense", {"accuracy": 0.8}, "accuracy", None, 100, 100, 1.0, 0.0),
            Setting("half", {"accuracy": 0.79}, "accuracy", 0.9, 50, 50, 0.5, 1.0),
        ]
        engines = [EngineRow(s.name, "torch", 1, 2.0, 0.2, 500.0, "texts/s") for s in settings]
        return Run("a model", {}, {}, settings, engines, load_lines=['model = gossamer.load("x")', "model(y)"])

    stand_in = ModuleType("gossamer.demos.llm")
    stand_in.run = run
    monkeypatch.setitem(sys.modules, "gossamer.demos.llm", stand_in)
    result = gossamer("demo", "llm", "--out", tmp_path, "--seconds", 7)
    assert result.exit_code == 0, result.stderr
    assert asked == {"out": tmp_path, "seconds": 7.0}
    assert "1.00×" in result.stdout
    assert 'model = gossamer.load("x")' in result.stdout
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "run.json").exists()
    held = json.loads(gossamer("demo", "llm", "--out", tmp_path, "--json").stdout)
    assert held["report"].endswith("report.html")
    assert gossamer("demo", "llama").exit_code == 2
