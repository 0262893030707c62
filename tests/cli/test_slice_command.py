"""gossamer slice: from a folder to a narrower model, and what it refuses."""

from __future__ import annotations

import json

import torch
from conftest import llama, record


def test_slices_saves_and_says_what_it_did(gossamer, text_file, tmp_path):
    folder, out = llama(tmp_path / "dense", width=32), tmp_path / "narrow"
    flags = ("--keep", 0.5, "--data", text_file, "--samples", 8, "--length", 16, "--out", out)
    held = record(gossamer("slice", folder, *flags, "--json"))
    assert held["width"] == 16 and held["parameters"] < held["parameters_before"] and held["resumed"] == 0
    assert not (out / ".work").exists()
    assert json.loads((out / "gossamer-slice.json").read_text())["job"]["keep"] == 0.5

    from gossamer import load

    model = load(out)
    assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 64)
    assert model.model.layers[0].self_attn.q_proj.in_features == 16
    assert gossamer("slice", folder, *flags).exit_code == 3  # OUT holds a result
    shown = gossamer("slice", folder, *flags, "--overwrite")
    assert shown.exit_code == 0 and "32 → 16" in shown.stdout


def test_an_unfinished_run_is_taken_up_and_another_is_refused(gossamer, text_file, tmp_path, monkeypatch):
    folder, out = llama(tmp_path / "dense", width=32), tmp_path / "narrow"
    flags = ("--data", text_file, "--samples", 8, "--length", 16, "--out", out, "--json")
    import gossamer.cli.slice as command

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(command, "whole_folder", full)
        assert gossamer("slice", folder, "--keep", 0.5, *flags).exit_code != 0
    assert gossamer("slice", folder, "--keep", 0.75, *flags).exit_code == 3
    assert record(gossamer("slice", folder, "--keep", 0.5, *flags))["resumed"] == 4


def test_too_little_text_is_a_clear_error(gossamer, text_file, tmp_path):
    folder = llama(tmp_path / "dense", width=32)
    told = gossamer("slice", folder, "--data", text_file, "--samples", 1, "--length", 8, "--out", tmp_path / "out")
    assert told.exit_code == 3 and "do not tell which of 32 columns matter" in told.stderr
