"""Dense engines: checked against torch before they are timed, each in its own process; those that cannot say why."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gossamer
from gossamer.core.errors import BudgetError, CalibrationError, GossamerError, UnknownName
from gossamer.deploy import processes
from gossamer.deploy.contest import WHOLE, Contest
from gossamer.deploy.engines import available, engines, first_item, measure_engines, time_here
from gossamer.deploy.export import export_onnx, named_inputs
from gossamer.deploy.worker import _difference, _times

BUILT_IN = ("torch", "torch + oneDNN")


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(**sizes, vocab_size=50, max_position_embeddings=32)).eval()


@pytest.fixture
def batch():
    ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_engines_in_this_process_agree_with_torch(batch):
    found = engines(bert(), batch)
    assert [e.name for e in found] == [e.name for e in available()] and found[0].name == "torch"
    for engine in found:
        assert engine.run is not None, engine.note
        assert engine.difference < (0.1 if "bf16" in engine.name else 1e-3)
        assert engine.run()[0].shape == (3, 8, 32)


def test_plain_modules_export_too(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)).eval()
    x = torch.randn(4, 6)
    from gossamer.deploy.runners import runner

    run = runner("onnxruntime", export_onnx(net, x, tmp_path / "n.onnx"), 1)({"input_0": x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(run()[0]), net(x), atol=1e-5)


def test_each_engine_and_packed_model_gets_a_line_per_thread_count(batch):
    model = bert()
    w = model.encoder.layer[0].output.dense.weight
    w.data.mul_(torch.rand_like(w) < 0.2)
    packed = gossamer.pack(model, batch, repeats=1)
    steps = []
    lines = measure_engines(
        model,
        batch,
        packed={"sparse": packed},
        threads=(1, 2),
        seconds_each=0.05,
        rounds=1,
        include=["onnxruntime"],
        progress=lambda *step: steps.append(step),
    )
    assert [(r.engine, r.threads) for r in lines] == [
        (name, count) for name in ("onnxruntime", "sparse") for count in (1, 2)
    ]
    for r in lines:
        assert r.note == "" and r.latency_ms > 0 and r.batch == 3
        assert r.throughput == pytest.approx(3000 / r.batch_ms) and r.difference < 1e-3
        assert r.to_dict()["version"]
    assert lines[0].nbytes is None and lines[2].nbytes > 0
    assert steps[-1][1] == steps[-1][2] == 4


def test_an_engine_with_wrong_results_is_refused(batch, monkeypatch):
    module = sys.modules["gossamer.deploy.engines"]
    monkeypatch.setitem(module.TOLERANCE, "torch", -1.0)
    (line,) = measure_engines(bert(), batch, threads=(1,), seconds_each=0.05, rounds=1, include=["torch"])
    assert line.latency_ms is None and "off torch's" in line.note
    assert all("off torch's" in e.note for e in engines(bert(), batch) if e.name in BUILT_IN)


def test_an_engine_that_dies_leaves_a_note_and_the_others_their_times(batch, monkeypatch):
    take_turn = processes.Worker.take_turn

    def killed(self, seconds, times):
        self.process.kill()
        self.process.wait()
        return take_turn(self, seconds, times)

    monkeypatch.setattr(processes.Worker, "take_turn", killed)
    (line,) = measure_engines(bert(), batch, threads=(1,), seconds_each=0.05, rounds=2, include=["torch"])
    assert line.latency_ms is None and "process ended" in line.note


def test_differences_see_shapes_values_and_nan():
    import numpy as np

    one = {"output_000": np.array([1.0, 2.0])}
    assert _difference([np.array([1.0, 2.0])], one) == 0.0
    assert _difference([np.array([1.0, 1.0])], one) == 0.5
    assert _difference([np.array([1.0])], one) == _difference([np.array([1.0, np.nan])], one) == float("inf")
    assert _difference([], one) == float("inf")


def test_a_run_is_timed_at_least_three_times():
    calls = []
    assert len(_times(lambda: calls.append(1), 0.0)) == 3 and len(calls) == 4


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


def test_own_classes_are_timed_in_this_process():
    x = torch.randn(5, 4)
    with pytest.raises(GossamerError, match="time_here"):
        measure_engines(Mine().eval(), x, include=["torch"])
    (line,) = time_here({"mine": Mine()}, x, rounds=3)
    assert line.latency_ms > 0 and line.batch == 5 and line.note == "timed in a shared process"


def test_bad_requests_are_refused(batch):
    with pytest.raises(UnknownName, match="onnxruntime"):
        measure_engines(bert(), batch, include=["onnxruntim"])
    with pytest.raises(BudgetError):
        measure_engines(bert(), batch, seconds_each=0)
    with pytest.raises(CalibrationError, match="use_cache"):
        named_inputs({"input_ids": batch["input_ids"], "use_cache": False})
    assert first_item(batch)["input_ids"].shape == (1, 8) and first_item((torch.ones(3, 2),))[0].shape == (1, 2)


def test_models_of_one_name_keep_their_own_files(batch, tmp_path):
    contest = Contest(tmp_path, batch, first_item(batch), None)
    models = [bert() for _ in range(3)]
    for scale, model in enumerate(models):
        model.encoder.layer[0].output.dense.weight.data.mul_(1 + scale)
    contest.add_packed("dense", models[1])
    contest.add_packed("dense", models[2], kind=WHOLE)
    contest.add_dense(models[0], ["torch"])
    for entry, model in zip(contest.entries, [*models[1:], models[0]], strict=True):
        held = gossamer.load(entry.models["latency"])
        assert torch.equal(held.encoder.layer[0].output.dense.weight, model.encoder.layer[0].output.dense.weight)
        want = load_file(contest._wanted_file(entry.wanted, "throughput"))["output_000"]
        with torch.no_grad():
            torch.testing.assert_close(model(**batch)[0], want)
    assert len({entry.files for entry in contest.entries}) == 3
