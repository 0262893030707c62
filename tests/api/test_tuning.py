"""Tuning: measured once per machine, asked again when anything differs, and never a reason to fail."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gossamer
from gossamer.deploy import earlier, report_of
from gossamer.deploy.record import PackReport
from gossamer.kernels import tuning
from gossamer.runtime import compiled
from gossamer.runtime import weights as forms

ROOT = Path(__file__).parents[2]
CANDIDATES = ["csr", "rowgrouped/cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of tunings; compiled kernels stay where they are."""
    monkeypatch.setattr(tuning, "cache_root", lambda: tmp_path)
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Shapes of the layers that `pack` really measures."""
    shapes, really = [], earlier.measure
    monkeypatch.setattr(
        earlier, "measure", lambda product, *a, **k: shapes.append(product.w_MK.shape) or really(product, *a, **k)
    )
    return shapes


def net(density=0.25):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    gossamer.prune(model, "magnitude", density=density, pattern="4-row")
    return model


X = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))


def packed(model=None, **options):
    return gossamer.pack(model or net(), X, **{"candidates": CANDIDATES, "repeats": 1} | options)


def files(folder):
    return sorted((folder / "tunings").rglob("*.json"))


def test_the_second_packing_measures_nothing_and_says_so(measured, cache):
    first, second = packed(), None
    assert len(measured) == 2 and len(files(cache)) == 2
    second = packed()
    assert len(measured) == 2
    one, two = report_of(first).layers, report_of(second).layers
    assert not any(layer.measured_earlier for layer in one) and all(layer.measured_earlier for layer in two)
    assert [(a.ms, a.trials, a.reason) for a in one] == [(b.ms, b.trials, b.reason) for b in two]
    assert torch.equal(first(X), second(X))
    assert [row["measured"] for row in report_of(second).rows()] == ["earlier", "earlier"]


def test_remeasure_measures_and_replaces(measured, cache):
    packed()
    for file in files(cache):
        record = json.loads(file.read_text())
        record["value"]["trials"][0]["ms"] = 1e9
        file.write_text(json.dumps(record))
    report = report_of(packed(remeasure=True))
    assert len(measured) == 4 and not any(layer.measured_earlier for layer in report.layers)
    assert report_of(packed()).layers[0].trials == report.layers[0].trials and len(measured) == 4


@pytest.mark.parametrize(
    "change",
    [{"repeats": 2}, {"threads": 2}, {"candidates": ["csr"]}, {"fuse": False}, {"model": net(0.5)}],
    ids=lambda change: next(iter(change)),
)
def test_other_work_is_measured_anew(measured, change):
    packed(threads=1)
    before = len(measured)
    packed(**{"threads": 1} | change)
    assert len(measured) > before


@pytest.mark.parametrize("field", ["cpu", "features", "gossamer", "torch", "llvmlite", "kernels"])
def test_another_processor_or_version_is_measured_anew(measured, monkeypatch, field):
    packed()
    here = tuning.machine()
    monkeypatch.setattr(tuning, "machine", lambda: here | {field: "another"})
    packed()
    assert len(measured) == 4


def test_a_record_of_another_machine_in_our_place_is_not_believed(measured, cache):
    packed()
    for file in files(cache):
        record = json.loads(file.read_text())
        record["machine"]["cpu"] = "a faster one"
        file.write_text(json.dumps(record))
    packed()
    assert len(measured) == 4


def _without_a_trial(text):
    record = json.loads(text)
    del record["value"]["trials"][1]
    return json.dumps(record)


def _with_first_time(ms):
    def change(text):
        record = json.loads(text)
        record["value"]["trials"][0]["ms"] = ms
        return json.dumps(record)

    return change


DAMAGES = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "not text": lambda text: "\udcff\udcfe\x00",
    "a list": lambda text: "[1, 2]",
    "no fields": lambda text: "{}",
    "too deep": lambda text: "[" * 100_000,
    "other value": lambda text: json.dumps(json.loads(text) | {"value": None}),
    "fewer trials": _without_a_trial,
    "time is NaN": _with_first_time(float("nan")),
    "time is below 0": _with_first_time(-1.0),
    "time is a word": _with_first_time("fast"),
    "no time": _with_first_time(None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_records_are_measured_again_and_mended(measured, cache, damage):
    packed()
    for file in files(cache):
        file.write_bytes(damage(file.read_text()).encode(errors="surrogateescape"))
    assert not any(layer.measured_earlier for layer in report_of(packed()).layers) and len(measured) == 4
    assert all(layer.measured_earlier for layer in report_of(packed()).layers) and len(measured) == 4


@pytest.mark.parametrize("word", ["0", "off", "No"])
def test_switched_off_nothing_is_read_or_written(measured, cache, monkeypatch, word):
    packed()
    monkeypatch.setenv(tuning.SWITCH, word)
    kept = [file.read_bytes() for file in files(cache)]
    packed()
    assert len(measured) == 4 and [file.read_bytes() for file in files(cache)] == kept


def test_a_folder_that_cannot_be_written_is_no_error(measured, cache):
    (cache / "tunings").write_text("a file where the folder should be")
    packed(), packed()
    assert len(measured) == 4


def test_times_of_other_devices_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(earlier, "measure", lambda *a, **k: "times")
    work = SimpleNamespace(device=torch.device("cuda"))
    assert earlier.measured_or_recalled("look", work, [], 1) == ("times", False) and not files(cache)


def test_compile_remembers_the_forms_and_the_threads(monkeypatch, cache):
    timed, really = [], forms._in_turn
    monkeypatch.setattr(forms, "_in_turn", lambda ways: timed.append(list(ways)) or really(ways))
    whole, shortest = [], compiled._shortest
    monkeypatch.setattr(compiled, "_shortest", lambda *a, **k: whole.append(1) or shortest(*a, **k))
    torch.set_num_threads(2)
    model = net(0.5)
    first = gossamer.compile(model, X)
    count, runs = len(timed), len(whole)
    assert count >= 2 and runs >= 1 and f"{count} measured now" in first.explain(X)
    second = gossamer.compile(model, X)
    assert len(timed) == count and len(whole) == runs
    assert "0 measured now" in second.explain(X) and torch.allclose(first(X), second(X), atol=1e-5)
    gossamer.compile(model, X, remeasure=True)
    assert len(timed) > count and len(whole) > runs


@pytest.mark.parametrize("value", ["{}", "[]", "7", '{"csr": 0}', '{"csr": "fast"}', '{"no such form": 1.0}', "null"])
def test_damaged_forms_are_measured_again(cache, value):
    model = net(0.5)
    gossamer.compile(model, X)
    for file in files(cache):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"value": json.loads(value)}))
    again = gossamer.compile(model, X)
    assert "0 measured earlier" in again.explain(X)
    torch.testing.assert_close(again(X), model(X), rtol=1e-4, atol=1e-5)


def test_reports_saved_before_there_was_a_memory_can_be_read():
    record = json.loads(json.dumps(report_of(packed()).to_dict()))
    for layer in record["layers"]:
        del layer["measured_earlier"]
    assert not any(layer.measured_earlier for layer in PackReport.from_dict(record).layers)


WRITER = """
import sys
from gossamer.kernels.tuning import recall, remember
for i in range(300):
    remember("both", {"n": i % 3}, [i] * 400)
    held = recall("both", {"n": i % 3}, list)
    assert held is not None and len(set(held)) == 1 and len(held) == 400, held
print("done")
"""


def test_processes_that_write_at_once_see_whole_records(tmp_path):
    env = {"GOSSAMER_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": ""}
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    ends = [child.communicate() for child in children]
    assert all(said == b"done\n" for said, _ in ends), ends
    assert len(files(tmp_path)) == 3 and not list((tmp_path / "tunings").rglob(".*"))


MEASURING = [
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "gossamer" / "demos").rglob("*.py"),
    ROOT / "gossamer" / "cli" / "bench.py",
    ROOT / "gossamer" / "deploy" / "engines.py",
    ROOT / "gossamer" / "runtime" / "runner.py",
]


def remembering(source):
    """Lines of calls of `pack` or of our `compile` that do not ask to measure anew."""
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("pack", "compile", "gossamer.pack", "gossamer.compile") and "remeasure=True" not in ast.unparse(
            node
        ):
            yield node.lineno


@pytest.mark.parametrize("file", MEASURING, ids=lambda f: str(f.relative_to(ROOT)))
def test_benchmarks_and_demos_measure_in_that_run(file):
    assert list(remembering(file.read_text())) == []


def test_a_planted_use_of_the_memory_is_seen():
    assert list(remembering("import gossamer\nfast = gossamer.compile(m, x)")) == [2]
