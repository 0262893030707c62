"""train: a run that is stopped anyhow goes on exactly, and its record tells the truth."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gossamer.core.errors import FileDamaged, GossamerError, NonFiniteError, TargetError, UnknownName
from gossamer.data.tasks import TASKS, lot, photos, task
from gossamer.data.tasks.clothes import Net, Transformer
from gossamer.data.tasks.series import TimeNet
from gossamer.data.tasks.wikitext import LSTM, Llama
from gossamer.recipes import train as recipe
from gossamer.recipes.plan import Plan
from gossamer.recipes.train import train
from gossamer.recipes.trained import read_trained

ROOT = Path(__file__).parents[2]
SHORT = Plan(task="teacher", steps=40, batch=32, rate=3e-3, save_every=7, decay=0.01)
RIGL = replace(SHORT, method="rigl", density=0.2, options={"every": 4})


def stop_at(step: int, how: type[BaseException] = KeyboardInterrupt):
    def progress(what: str, done: int, total: int) -> None:
        if done == step:
            raise how

    return progress


@pytest.mark.parametrize(
    "plan", [SHORT, RIGL, replace(RIGL, backend="sparse"), replace(SHORT, method="snip", density=0.2)]
)
@pytest.mark.parametrize("at", [5, 21, 39])
def test_a_run_that_dies_goes_on_bit_for_bit(plan, at, tmp_path):
    whole = train(task("teacher"), plan, tmp_path / "whole")
    with pytest.raises(MemoryError):
        train(task("teacher"), plan, tmp_path / "cut", progress=stop_at(at, MemoryError))
    cut = train(task("teacher"), plan, tmp_path / "cut")
    blank = {"seconds": 0, "processor_seconds": 0, "interruptions": 0}
    assert replace(cut, **blank) == replace(whole, **blank)
    assert cut.interruptions == (at >= 7)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() == task("teacher").build().state_dict().keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_what_a_killed_writer_left_is_swept(tmp_path):
    (tmp_path / ".checkpoint.pt.x1").touch()
    train(task("teacher"), replace(SHORT, steps=2), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_the_record_counts_by_hand(tmp_path):
    run = train(task("teacher"), RIGL, tmp_path)
    sizes = [32 * 128, 128 * 128, 128 * 8]
    assert [r.size for r in run.layers] == sizes and sum(r.kept for r in run.layers) == round(0.2 * sum(sizes))
    assert run.dense_flops == 6 * sum(sizes) * 32 * 40 and 0.19 < run.flops / run.dense_flops < 0.35
    assert run.parameters == sum(sizes) + 264 and run.nonzeros <= round(0.2 * sum(sizes)) + 264
    dense = train(task("teacher"), SHORT, tmp_path / "dense")
    assert dense.flops == dense.dense_flops == run.dense_flops and dense.is_dense and not dense.churned
    assert read_trained(tmp_path) == run and train(task("teacher"), RIGL, tmp_path) == run


def test_ctrl_c_saves_the_step_and_kill_9_loses_no_more_than_a_checkpoint(tmp_path):
    program = (
        "import signal, sys; from gossamer.recipes.train import train; from gossamer.recipes.plan import Plan;"
        "from gossamer.data.tasks import task;"
        "die = lambda what, done, total: done == 13 and signal.raise_signal(int(sys.argv[2]));"
        f"train(task('teacher'), Plan(**{{**{RIGL.to_dict()!r}, 'save_every': 10}}), sys.argv[1], progress=die)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for how, saved in ((signal.SIGINT, 13), (signal.SIGKILL, 10)):
        folder = tmp_path / str(int(how))
        command = [sys.executable, "-c", program, str(folder), str(int(how))]
        assert subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode != 0
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == saved
    whole = train(task("teacher"), replace(RIGL, save_every=10), tmp_path / "whole")
    for how in (signal.SIGINT, signal.SIGKILL):
        again = train(task("teacher"), replace(RIGL, save_every=10), tmp_path / str(int(how)))
        assert again.quality == whole.quality and again.curve == whole.curve and again.interruptions == 1


def test_what_cannot_be_is_refused(tmp_path):
    train(task("teacher"), SHORT, tmp_path / "a")
    with pytest.raises(TargetError, match=r"seed = 0, now it is 1"):
        train(task("teacher"), replace(SHORT, seed=1), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").touch()
    with pytest.raises(TargetError, match="something else"):
        train(task("teacher"), SHORT, tmp_path / "b")
    with pytest.raises(NonFiniteError, match="lower rate"):
        train(task("teacher"), replace(SHORT, rate=1e30, optimizer="sgd"), tmp_path / "c")
    with pytest.raises(FileDamaged, match="delete it to start"):
        recipe._save(tmp_path / "d" / "checkpoint.pt", {})
        recipe._read(Path(__file__))
    with pytest.raises(FileDamaged, match="gossamer train"):
        read_trained(tmp_path / "b")
    with pytest.raises(UnknownName, match="'teacher'"):
        task("teachr")
    ignored = ({"density": 0.5}, {"targets": ("0",)}, {"skip": ("0",)}, {"allocation": "erk"}, {"backend": "sparse"})
    for bad in ({"steps": 0}, {"rate": 0.0}, {"optimizer": "adm"}, *ignored):
        with pytest.raises(GossamerError):
            replace(SHORT, **bad)


def test_starting_from_a_trained_network_is_recorded_with_its_cost(tmp_path):
    first = train(task("teacher"), SHORT, tmp_path / "a")
    second = train(task("teacher"), replace(RIGL, start=str(tmp_path / "a")), tmp_path / "b")
    assert second.start_flops == first.flops and second.cost == first.flops + second.flops
    assert second.curve[0][1] != train(task("teacher"), RIGL, tmp_path / "c").curve[0][1]


def test_every_sample_comes_once_an_epoch():
    first = torch.cat([lot(100, step, 10, 3) for step in range(10)])
    second = torch.cat([lot(100, step, 10, 3) for step in range(10, 20)])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(100))
    assert not torch.equal(first, second) and not torch.equal(lot(100, 0, 10, 4), first[:10])


def test_the_networks_of_the_tasks_have_the_size_that_they_say():
    names = {"clothes-cnn", "clothes-vit", "photos-edsr", "teacher", "ucr-cnn", "wikitext-llama", "wikitext-lstm"}
    assert set(TASKS) == names
    x = torch.zeros(2, 1, 28, 28)
    for network, weights in ((Net(16), 106), (Transformer(), 450)):
        assert network(x).shape == (2, 10)
        assert round(sum(p.numel() for p in network.parameters() if p.ndim > 1) / 1000) == weights
    series = TimeNet()
    assert series(torch.zeros(2, 46)).shape == (2, 24)
    assert sum(p.numel() for p in series.parameters() if p.ndim > 1) == 67520
    lstm = LSTM()
    assert sum(p.numel() for n, p in lstm.named_parameters() if p.ndim > 1 and n != "embed.weight") == 393216
    llama = Llama()
    assert sum(m.weight.numel() for m in llama.modules() if isinstance(m, torch.nn.Linear)) == 811008
    assert sum(m.weight.numel() for m in photos.Edsr().modules() if isinstance(m, torch.nn.Conv2d)) == 39528


@pytest.mark.parametrize("kind", [Llama, LSTM])
def test_a_language_model_sees_no_byte_that_comes_later(kind):
    torch.manual_seed(0)
    model, text = kind(), torch.randint(256, (1, 16))
    other = text.clone()
    other[0, 10] = (other[0, 10] + 1) % 256
    change = (model(text) - model(other)).abs().amax(-1)[0]
    assert not change[:10].any() and change[10:].all()


def test_patches_of_photographs_lie_where_their_small_ones_do(monkeypatch):
    """Every large picture is its small one with each pixel four times, and so is every patch, however turned."""
    small = torch.rand(20, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    four = lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    monkeypatch.setattr(photos, "pictures", lambda: (small, four(small)))
    x, y = task("photos-edsr").batch(0, 64, 5)
    assert x.shape == (64, 3, 24, 24) and torch.equal(four(x), y)
    again, other = (task("photos-edsr").batch(0, 64, seed)[0] for seed in (5, 6))
    assert torch.equal(x, again) and not torch.equal(x, other)
    square = torch.arange(12.0).view(3, 2, 2)
    assert len({tuple(photos._turned(square, way).flatten().tolist()) for way in range(8)}) == 8


def test_photographs_are_judged_by_luma_without_their_edges(monkeypatch):
    small = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = photos.doubled(small).clamp(0, 1)
    off = large.clone()
    off[:, 1, 4:12, 4:12] += 0.1  # green alone, away from the edges
    off[:, :, :2] += 0.5
    monkeypatch.setattr(photos, "pictures", lambda: (small, off))
    square = (0.1 * 128.553) ** 2 * 64 / 144
    assert photos.psnr(photos.doubled) == pytest.approx(10 * math.log10(255**2 / square), abs=1e-3)


@pytest.mark.assets
def test_twenty_photographs_are_halved_to_whole_levels():
    small, large = photos.pictures()
    assert small.shape == (20, 3, 112, 112) and large.shape == (20, 3, 224, 224)
    assert torch.equal((small * 255).round() / 255, small) and 0 <= small.min() < small.max() <= 1
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.02
    assert 30 < photos.psnr(photos.doubled) < 35  # bicubic interpolation alone
