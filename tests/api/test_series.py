"""Time series: the archive's files are read as published, and the tasks on sequences train, stop and go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gossamer import data
from gossamer.core.errors import AssetError
from gossamer.data.series import read_ucr
from gossamer.data.tasks import series, task, wikitext
from gossamer.recipes.plan import Plan
from gossamer.recipes.train import train


def test_a_file_of_the_archive_is_read(tmp_path):
    file = tmp_path / "Toy_TRAIN.tsv"
    file.write_text("2\t0.5\t-1\n1\t1e-2\t3\n")
    held = read_ucr(file)
    assert held.labels.tolist() == [1, 0] and len(held) == 2 and held.series.dtype == torch.float32
    assert torch.equal(held.series, torch.tensor([[0.5, -1.0], [0.01, 3.0]]))


@pytest.mark.parametrize("text", ["1\tx\n", "1\t2\t3\n1\t2\n", "0\t1\n", "1.5\t1\n", "1\n"])
def test_another_file_is_refused(text, tmp_path):
    file = tmp_path / "Toy_TRAIN.tsv"
    file.write_text(text)
    with pytest.raises(AssetError, match="Toy_TRAIN"):
        read_ucr(file)


@pytest.mark.assets
def test_crop_is_whole():
    if not data.cached("ucr-crop"):
        pytest.skip("not in the cache: ucr-crop (large; run gossamer.data.fetch to include it)")
    crop = data.ucr_crop()
    assert crop.train.series.shape == (7200, 46) and crop.test.series.shape == (16800, 46)
    assert crop.train.labels.bincount().tolist() == [300] * 24
    assert crop.test.labels.bincount().tolist() == [700] * 24
    x, *_ = series.tensors()
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-5


@pytest.fixture
def small(monkeypatch):
    """Data of the same shapes, drawn at random."""
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(96, 46, generator=g), torch.randint(24, (96,), generator=g)
    monkeypatch.setattr(series, "tensors", lambda: (x, y, x, y))
    monkeypatch.setattr(series, "SERIES", 96)
    text = torch.randint(256, (64, wikitext.WINDOW + 1), generator=g, dtype=torch.uint8)
    monkeypatch.setattr(wikitext, "_windows", lambda split: text[:, :25])


@pytest.mark.parametrize("name", ["ucr-cnn", "wikitext-lstm"])
def test_a_sparse_run_that_dies_goes_on_bit_for_bit(name, small, tmp_path):
    plan = Plan(name, 6, 8, 1e-2, method="rigl", density=0.2, options={"every": 2}, save_every=2)

    def die(what: str, done: int, total: int) -> None:
        if done == 5:
            raise MemoryError

    whole = train(task(name), plan, tmp_path / "whole")
    with pytest.raises(MemoryError):
        train(task(name), plan, tmp_path / "cut", progress=die)
    cut = train(task(name), plan, tmp_path / "cut")
    own = {"seconds": 0, "processor_seconds": 0, "interruptions": 0}
    assert replace(cut, **own) == replace(whole, **own)
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "cut"))
    assert a.keys() == task(name).build().state_dict().keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert sum(r.kept for r in whole.layers) == round(0.2 * sum(r.size for r in whole.layers))
    assert {"lstm.weight_hh_l0", "conv2"} & {r.name for r in whole.layers}
