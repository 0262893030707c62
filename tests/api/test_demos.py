"""The two demos, cut to seconds: real assets, every stage, and the lines they print are run as printed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gossamer.data import cached
from gossamer.demos import timing
from gossamer.report import headline, load_run, write_report

pytestmark = pytest.mark.assets


def _run_lines(lines: tuple[str, ...]) -> None:
    scope: dict[str, object] = {}
    for line in lines:
        exec(line, scope)


@pytest.fixture
def quick(monkeypatch):
    """One thread, two dense engines: each further worker costs seconds to start and shows nothing new."""
    monkeypatch.setattr(timing, "THREADS", (1,))
    few = partial(timing.measure_engines, include=["torch", "onnxruntime"])
    monkeypatch.setattr(timing, "measure_engines", few)


def test_the_main_demo_measures_every_stage(tmp_path, capsys, quick) -> None:
    pytest.importorskip("onnxruntime")
    from gossamer.demos.minilm import PROBE, ROWS, Plan, run

    plans = [Plan("half", ROWS, 0.5), Plan("most", ROWS, 0.2, steps=3)]
    stages: list[str] = []
    made = run(
        tmp_path, seconds=10, measure_seconds=2, plans=plans, reviews=300, progress=lambda what, *_: stages.append(what)
    )
    assert [s.name for s in made.settings] == ["dense", "half", "most"]
    assert [round(s.density, 2) for s in made.settings] == [1.0, 0.5, 0.2]
    dense, half, most = made.settings
    assert 0.6 < dense.quality[PROBE] < 0.95 and dense.quality[PROBE] != most.quality[PROBE]
    assert most.bytes_disk < half.bytes_disk < dense.bytes_disk
    ran = {(r.setting, r.engine) for r in made.engines}
    ours = {(name, "gossamer") for name in ("half", "most")}
    assert {("dense", "torch"), ("dense", "onnxruntime")} | ours <= ran, made.notes
    assert all(r.latency_ms > 0 and r.throughput > 0 for r in made.engines)
    assert any(r.format == "rowgrouped" for r in made.layers if r.setting == "most")
    assert any("recovering: most" in s for s in stages)
    page = write_report(made, tmp_path / "report.html")
    assert load_run(page.with_name("run.json")).settings == made.settings and headline(made)
    _run_lines(made.load_lines)
    assert "tensor" in capsys.readouterr().out


def test_the_language_model_demo_measures_every_stage(tmp_path, capsys, quick) -> None:
    if not (cached("smollm2-135m") and cached("wikitext2")):
        pytest.skip("needs smollm2-135m and wikitext2 (178 MB): gossamer assets fetch smollm2-135m wikitext2")
    from gossamer.demos.llm import PPL, Size, run

    made = run(tmp_path, seconds=1, size=Size(calibration=2, test=1, length=64))
    by_name = {s.name: s for s in made.settings}
    assert set(by_name) == {"dense", "magnitude 50 %", "Wanda 50 %", "SparseGPT 50 %"}
    sparse = [s for s in made.settings if s.name != "dense"]
    assert all(s.density == pytest.approx(0.5, abs=1e-3) and s.bytes_disk < by_name["dense"].bytes_disk for s in sparse)
    assert by_name["magnitude 50 %"].quality[PPL] > by_name["dense"].quality[PPL]
    engines = {(r.setting, r.engine) for r in made.engines}
    dense = {("dense", e) for e in ("torch", "torch + oneDNN", "gossamer's decoder, dense")}
    assert engines == dense | {("SparseGPT 50 %", "gossamer")}
    torch.manual_seed(0)
    _run_lines(made.load_lines)
    assert "spider" in capsys.readouterr().out
