"""The benchmark harness: wrong numbers give no speed-up, crashes are reported, a stopped run goes on."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import run as command_line
from benchmarks.harness import Case, plots, report
from benchmarks.harness import run as harness
from benchmarks.harness.compare import Comparison
from benchmarks.harness.conventions import Effort
from benchmarks.harness.gate import Truths, relative_error
from benchmarks.harness.outcome import Outcome
from benchmarks.harness.partial import Partial
from benchmarks.harness.problem import load, names
from benchmarks.harness.rounds import Rounds, blocks
from benchmarks.roofline import Roof

QUICKLY = Effort(rounds=2, seconds=0.001, patience=3.0)
ROOF = Roof(1, fp32_gflops=100.0, bf16_gflops=None, l1_gbs=400.0, l2_gbs=200.0, memory_gbs=20.0)


@pytest.fixture(scope="module")
def problem():
    return load("fake_benchmark", package="tests.api")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def measured(problem, tmp_path_factory):
    """Both blocks at one thread, all solvers but the one that hangs, by (solver, case)."""
    solvers = [s for s in problem.solvers if s.name != "hanging"]
    rounds = Rounds(problem, solvers, QUICKLY, Truths(problem, tmp_path_factory.mktemp("truth")))
    outcomes = [o for block in blocks(problem, problem.cases, [1]) for o in rounds.measure(block)]
    for outcome in outcomes:
        outcome.work = problem.work(problem.case(outcome.case), problem.module.build(problem.case(outcome.case)))
    return Comparison(problem, outcomes)


def of(measured, solver, case="8-0.5"):
    return measured.by_key[solver, case, 1]


def test_a_right_solver_is_compared_with_the_fastest_right_dense_engine(measured):
    ratio = measured.ratio(of(measured, "right", "8-0.25"), "best dense")
    assert ratio.rival == "dense" and ratio.times > 10
    assert of(measured, "reads_files").usable and of(measured, "right").measures == {"bytes": 512.0}


def test_dense_engines_are_timed_once_per_dense_case(measured):
    assert {o.case for o in measured.outcomes if o.solver == "dense"} == {"8-0.5", "16-0.5"}


@pytest.mark.parametrize("solver", ["wrong", "wrong_later", "not_finite"])
def test_wrong_numbers_are_refused_and_give_no_speed_up(measured, solver):
    outcome = of(measured, solver)
    assert "wrong numbers" in outcome.why_not and measured.ratio(outcome, "best dense").times is None
    row = next(r for r in report.rows(measured) if solver in r)
    assert row[-1] == "–" and any(f"refused: {solver} on 8-0.5" in note for note in report.notes(measured))
    assert not any(s.startswith(f"{solver} over") for s in measured.summaries())


def test_an_exception_is_reported(measured):
    assert of(measured, "raising").why_not == "ArithmeticError: no such product"


def test_a_crash_is_reported_and_ends_neither_the_run_nor_the_solvers_other_cases(measured):
    assert of(measured, "crashing").why_not == f"its process died with signal {signal.SIGSEGV.name}"
    assert of(measured, "crashing", "16-0.5").usable


def test_an_engine_that_cannot_run_here_says_why(measured):
    assert "no environment is called 'nowhere'" in of(measured, "elsewhere").why_not
    assert of(measured, "not_here").why_not == "needs a machine of another kind"


def test_a_solver_that_hangs_is_ended(problem, tmp_path):
    solver = [s for s in problem.solvers if s.name == "hanging"]
    rounds = Rounds(problem, solver, replace(QUICKLY, patience=1.0), Truths(problem, tmp_path))
    (outcome,) = rounds.measure(blocks(problem, problem.cases[:1], [1])[0])
    assert outcome.why_not == "no answer within 1 s"


def test_a_run_that_was_stopped_goes_on_from_its_finished_blocks(problem, tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_BENCHMARK_LOG", str(log))
    options = harness.Options(threads=(1,), only=("right", "dense"), effort=QUICKLY)
    measure = Rounds.measure

    def stopped(self, block):
        if block.name.startswith("16"):
            raise KeyboardInterrupt
        return measure(self, block)

    monkeypatch.setattr(Rounds, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        harness.run(problem, options)
    assert set(log.read_text().split()) == {"8"}
    monkeypatch.setattr(Rounds, "measure", measure)
    outcomes = harness.run(problem, options)
    assert log.read_text().split() == ["8", "8", "16", "16"] and all(o.usable for o in outcomes)
    assert "going on from" in capsys.readouterr().err
    harness.run(problem, options)
    assert log.read_text().split().count("8") == 4, "a complete run leaves nothing to go on from"


def test_a_partial_file_of_other_sources_or_in_ruins_is_not_used(problem):
    kept = Partial.of("fake", {"a": 1})
    kept.keep({"8|1": [Outcome("right", "8-0.5", 1, [1.0])]})
    assert kept.read()["8|1"][0].median_ms == 1.0
    assert replace(kept, settings=kept.settings | {"source": "another"}).read() == {}
    kept.path.write_text(kept.path.read_text()[:-20])
    assert kept.read() == {}


def test_results_are_written_where_asked_and_only_whole_runs_are_kept(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measure", lambda threads: ROOF)
    options = harness.Options(threads=(1,), only=("right", "dense"), effort=QUICKLY, out=tmp_path / "out")
    assert not options.whole and harness.Options().whole
    harness.run(problem, options)
    files = {f.suffix: f for f in (tmp_path / "out").iterdir()}
    assert set(files) == {".json", ".md", ".svg"}
    held = json.loads(files[".json"].read_text())
    assert {"hardware", "versions", "command", "settings", "roofs", "outcomes"} <= set(held)
    right = next(o for o in held["outcomes"] if o["solver"] == "right")
    assert right["noise"] >= 0 and right["speed_ups"]["best dense"]["over"] == "dense"
    assert "geometric mean" in files[".md"].read_text()


def test_the_plot_is_an_svg_for_light_and_dark(measured, tmp_path):
    drawn = plots.draw(measured, tmp_path / "plot.svg", {1: ROOF}).read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert "prefers-color-scheme: dark" in drawn and "1/density" in drawn and "roofline" in drawn


def test_a_problem_without_densities_has_no_plot(problem, tmp_path):
    bare = replace(problem, cases=(Case("8-0.5", {"size": 8}),))
    rival, ours = Outcome("dense", "8-0.5", 1, [2.0]), Outcome("right", "8-0.5", 1, [1.0])
    assert plots.draw(Comparison(bare, [rival, ours]), tmp_path / "plot.svg") is None


def test_errors_are_relative_and_shapes_must_agree():
    truth = [np.array([1.0, -4.0])]
    assert relative_error([np.array([1.0, -3.0])], truth) == 0.25
    assert math.isinf(relative_error([np.array([1.0])], truth)) and math.isinf(relative_error([], truth))
    assert math.isinf(relative_error([np.array([1.0, math.inf])], truth))


def test_noise_is_the_interquartile_range_over_the_median():
    assert Outcome("a", "b", 1, [1.0, 2.0, 3.0]).noise == pytest.approx(1.0)
    assert Outcome("a", "b", 1, [1.0]).noise == 0.0


def test_the_roof_is_the_slower_of_arithmetic_and_memory():
    assert ROOF.ms(flops=1e9) == pytest.approx(10.0) and ROOF.ms(flops=1e6, bytes=1e9) == pytest.approx(50.0)


@pytest.mark.parametrize("words", [["no-such-problem"], ["stacks", "--only", "nobody"], ["stacks", "--cases", "none"]])
def test_the_command_line_refuses_what_is_not_there(words, capsys):
    try:
        code = command_line.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code != 0 and "there are" in capsys.readouterr().err


@pytest.mark.parametrize("name", names())
def test_every_problem_can_be_read(name):
    found = load(name)
    assert found.cases and found.solvers and all(found.dense_case(c) in found.cases for c in found.cases)
    assert any(c.quick for c in found.cases)


def test_every_environment_pins_what_it_installs():
    for listed in Path("benchmarks/environments").glob("*.txt"):
        wanted = [line for line in listed.read_text().splitlines() if line and not line.startswith("#")]
        assert wanted and all("==" in line for line in wanted), listed


def test_an_environment_is_made_or_not_and_asking_makes_none(monkeypatch, tmp_path):
    from benchmarks.harness import environments

    monkeypatch.setattr(environments, "cache_root", lambda: tmp_path)
    assert environments.is_made("main") and not environments.is_made("deepsparse") and not list(tmp_path.iterdir())
    (environments._folder("deepsparse")).mkdir(parents=True)
    (environments._folder("deepsparse") / "complete").touch()
    assert environments.is_made("deepsparse")
    with pytest.raises(environments.EnvironmentFailed, match="deepsparse"):
        environments.is_made("deepspares")


def test_rivals_of_the_mobile_claims_run_here_without_a_download(monkeypatch):
    from benchmarks.harness.problem import load
    from claims import mobile

    monkeypatch.setattr(mobile, "is_made", lambda name: name == "main")
    quick, whole = (set(mobile.rivals(load("cnn"), full=full)) for full in (False, True))
    assert "torch_channels_last" in quick and quick <= whole <= {*quick, mobile.SLOW_TO_START}
    assert "deepsparse_dense" not in whole
