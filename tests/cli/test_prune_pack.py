"""prune, pack and bench from end to end on tiny models, and a pruning run that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import llama, record
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def zeros(folder: Path, part: str = "_proj") -> dict[str, float]:
    """Fraction of zeros per weight whose name holds `part`."""
    held = load_file(folder / "model.safetensors")
    return {n: float((w == 0).float().mean()) for n, w in held.items() if part in n and w.dim() == 2}


def test_wanda_2_4_on_a_llama(gossamer, llama_folder, text_file, tmp_path):
    out = tmp_path / "out"
    flags = ("--method", "wanda", "--pattern", "2:4", "--data", text_file, "--samples", 8, "--length", 16)
    held = record(gossamer("prune", llama_folder, *flags, "--out", out, "--json"))
    assert held["density"] == 0.5
    assert held["resumed_layers"] == 0
    assert held["next"].startswith("gossamer pack")
    assert set(zeros(out).values()) == {0.5}
    for name, w in load_file(out / "model.safetensors").items():
        if "_proj" in name:
            assert ((w.view(w.shape[0], -1, 4) != 0).sum(-1) == 2).all()
    assert not (out / ".work").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model(**tokenizer("word1 word2", return_tensors="pt")).logits.isfinite().all()


def test_a_recipe_says_the_same_as_flags_and_flags_win(gossamer, llama_folder, text_file, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {llama_folder}\nmethod: sparsegpt\nsparsity: 0.75\ndata: {text_file}\nsamples: 4\nlength: 16\n"
        "skip: ['*down_proj']\noptions: {damping: 0.1}\n"
    )
    record(gossamer("prune", "--recipe", file, "--out", tmp_path / "a", "--json"))
    flags = ("--method", "sparsegpt", "--sparsity", 0.75, "--data", text_file, "--samples", 4, "--length", 16)
    flags += ("--skip", "*down_proj", "--option", "damping=0.1")
    record(gossamer("prune", llama_folder, *flags, "--out", tmp_path / "b", "--json"))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert all(z == (0.0 if "down" in n else 0.75) for n, z in zeros(tmp_path / "a").items())
    over = record(gossamer("prune", "--recipe", file, "--density", 0.5, "--out", tmp_path / "c", "--json"))
    assert over["density"] == pytest.approx(0.5)


def test_yaml_does_not_turn_2_4_into_a_number(gossamer, llama_folder, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {llama_folder}\nmethod: magnitude\npattern: 2:4\nout: {tmp_path / 'o'}\n")
    assert record(gossamer("prune", "--recipe", file, "--json"))["density"] == 0.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("methd: wanda", "'method'"),
        ("samples: many", "whole number"),
        ("- wanda", "mapping"),
        ("density: [1]", "number from 0 to 1"),
        ("method: [", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused(gossamer, tmp_path, text, says):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    result = gossamer("prune", "minilm", "--recipe", file, "--out", tmp_path / "o")
    assert result.exit_code == 3
    assert says in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--method", "wanda"), "--data"),
        (("--method", "magnitude", "--density", 0.5, "--sparsity", 0.5), "same thing"),
        (("--method", "magnitude", "--option", "damp=1"), "no option 'damp'"),
        (("--method", "magnitude", "--option", "damp"), "NAME=VALUE"),
        (("--method", "magnitude", "--pattern", "2:5", "--targets", "*q_proj"), "do not fit"),
        (("--method", "magnitude", "--targets", "*q_prok"), "q_proj"),
        (("--method", "magnitude", "--regroup"), "ties neighbouring rows"),
        (("--method", "gradual_magnitude"), "--option"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(gossamer, llama_folder, tmp_path, flags, says):
    result = gossamer("prune", llama_folder, *flags, "--out", tmp_path / "o")
    assert result.exit_code == 3, result.stderr + result.stdout
    assert says in " ".join(result.stderr.replace("│", " ").split())


def test_rows_are_regrouped_by_flag_and_by_recipe(gossamer, llama_folder, tmp_path):
    flags = ("--method", "magnitude", "--pattern", "4-row", "--density", 0.25)
    told = gossamer("prune", llama_folder, *flags, "--regroup", "--out", tmp_path / "a")
    assert told.exit_code == 0 and "pattern (o {4}) [...], rows regrouped" in told.stdout
    (tmp_path / "r.yaml").write_text("regroup: true")
    again = gossamer("prune", llama_folder, *flags, "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "b", "--json")
    assert "rows regrouped" in json.loads(again.stdout)["pattern"]
    for name in ("a", "b"):
        assert "rows regrouped" in (tmp_path / name / "gossamer-prune.json").read_text()


def test_a_folder_with_something_in_it_is_kept(gossamer, llama_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    flags = ("--method", "magnitude", "--out", out)
    for more in ((), ("--overwrite",)):
        result = gossamer("prune", llama_folder, *flags, *more)
        assert result.exit_code == 3
        assert "choose another" in " ".join(result.stderr.replace("│", " ").split())
        assert (out / "thesis.txt").read_text() == "mine"


def test_an_earlier_result_is_replaced_when_asked_for(gossamer, llama_folder, tmp_path):
    out = tmp_path / "out"
    flags = ("prune", llama_folder, "--method", "magnitude", "--out", out)
    assert gossamer(*flags).exit_code == 0
    refused = gossamer(*flags, "--density", 0.25)
    assert refused.exit_code == 3
    assert "--overwrite" in refused.stderr
    assert set(zeros(out).values()) == {0.5}
    assert gossamer(*flags, "--density", 0.25, "--overwrite").exit_code == 0
    assert set(zeros(out).values()) == {0.75}


def test_a_model_on_disk_is_pruned_as_one_in_memory(gossamer, llama_folder, text_file, tmp_path):
    flags = ("--method", "wanda", "--density", 0.5, "--data", text_file, "--samples", 4, "--length", 16)
    for name, more in (("near", ()), ("far", ("--on-disk", "--spool", tmp_path / "spool"))):
        record(gossamer("prune", llama_folder, *flags, *more, "--out", tmp_path / name, "--json"))
    near, far = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("near", "far"))
    assert near == far
    assert {p.name for p in llama_folder.iterdir()} < {p.name for p in (tmp_path / "far").iterdir()}
    file = tmp_path / "r.yaml"
    file.write_text("evaluate: {windows: 1}\n")
    result = gossamer("prune", llama_folder, *flags, "--on-disk", "--recipe", file, "--out", tmp_path / "job")
    assert result.exit_code and "load the whole model" in result.stderr


def test_a_models_own_folder_is_not_pruned_over(gossamer, tmp_path):
    model = llama(tmp_path / "model")
    result = gossamer("prune", model, "--method", "magnitude", "--out", model, "--overwrite")
    assert result.exit_code == 3
    assert max(zeros(model).values()) < 0.01


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_record_of_an_unfinished_run_is_named(gossamer, llama_folder, tmp_path, text):
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    (work / "request.json").write_text(text, encoding="latin-1")
    result = gossamer("prune", llama_folder, "--method", "magnitude", "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert "start anew" in " ".join(result.stderr.replace("│", " ").split())


def test_allocation_by_sensitivity_measures_with_data(gossamer, llama_folder, text_file, tmp_path):
    flags = ("--method", "magnitude", "--density", 0.5, "--allocation", "sensitivity", "--out", tmp_path / "o")
    assert "--data" in gossamer("prune", llama_folder, *flags).stderr
    held = record(
        gossamer("prune", llama_folder, *flags, "--data", text_file, "--samples", 4, "--length", 16, "--json")
    )
    assert held["density"] == pytest.approx(0.5, abs=0.01)
    assert len(set(zeros(tmp_path / "o").values())) > 1


def test_blocks_are_reconstructed_when_asked_for(gossamer, llama_folder, text_file, tmp_path):
    small = ("--length", 16, "--samples", 8, "--batch", 2)
    flags = ("--method", "magnitude", "--density", 0.5, "--reconstruct", 2, *small)
    done = gossamer("prune", llama_folder, *flags, "--data", text_file, "--out", tmp_path / "out", "--json")
    blocks = json.loads(done.stdout)["blocks"]
    assert [name for name, _ in blocks] == ["model.layers.0", "model.layers.1"]
    assert all(fit["after"] <= fit["before"] for _, fit in blocks)
    refused = gossamer("prune", llama_folder, *flags, "--out", tmp_path / "other")
    assert refused.exit_code and "reconstruction trains blocks" in refused.stderr + refused.stdout


def test_an_encoder_is_calibrated_on_lines_packed_and_timed(gossamer, bert_folder, text_file, tmp_path):
    import gossamer as library

    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    flags = ("--method", "wanda", "--sparsity", 0.8, "--pattern", "4-row", "--data", text_file, "--samples", 12)
    record(gossamer("prune", bert_folder, *flags, "--out", pruned, "--json"))
    held = record(gossamer("pack", pruned, "--out", packed, "--tokens", 16, "--json"))
    assert len(held["layers"]) == 13
    assert all(layer["reason"] for layer in held["layers"])
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(held["load_lines"])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "torch.Size([1, 2, 32])" in ran.stdout

    from transformers import AutoModel

    ids = torch.arange(8)[None]
    want = AutoModel.from_pretrained(pruned).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(library.load(packed)(input_ids=ids).last_hidden_state, want, rtol=1e-4, atol=1e-5)

    timed = record(gossamer("bench", packed, "--threads", "1", "--tokens", 16, "--repeats", 3, "--json"))
    engines = {line["engine"]: line for line in timed["lines"]}
    assert engines["torch"]["ms"] > 0
    plain = gossamer("bench", pruned, "--threads", "1", "--tokens", 16, "--repeats", 3)
    assert plain.exit_code == 0
    assert "torch" in plain.stdout


def test_the_lines_of_models_without_a_tokenizer_run_too(tmp_path):
    from transformers import BertConfig, BertModel

    import gossamer as library
    from gossamer.cli.models import Loaded
    from gossamer.cli.pack import load_lines
    from gossamer.data.vision import MobileNetV2

    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    for name, model in {"pictures": MobileNetV2(), "it's words": BertModel(config)}.items():
        library.save(model.eval(), tmp_path / name)
        lines = load_lines(tmp_path / name, Loaded(name, model, None))
        assert len(lines) == 2
        exec("\n".join(lines), {})


def test_an_engine_that_rounds_is_shown_and_is_no_yardstick(monkeypatch):
    from torch import nn

    from gossamer.cli import bench
    from gossamer.deploy import engines

    times = {"torch": 8.0, "OpenVINO": 4.0, "OpenVINO bf16": 1.0, "gossamer": 2.0}
    speeds = [engines.Speed(name, "1", 1, throughput=1e3 / ms, batch_ms=ms) for name, ms in times.items()]
    monkeypatch.setattr(engines, "measure_engines", lambda *args, **options: speeds)
    ways = {"gossamer": nn.Identity(), "torch": nn.Identity()}
    lines = {n.engine: n for n in bench._beside_engines(ways, torch.ones(1), [1], 1, 1, print)}
    assert {name: line.speedup for name, line in lines.items()} == {
        "torch": 0.5,
        "OpenVINO": 1.0,
        "OpenVINO bf16": 4.0,
        "gossamer": 2.0,
    }
    assert lines["OpenVINO bf16"].precision == "bf16"
    assert "0.50× the speed of OpenVINO bf16" in lines["gossamer"].note


def test_a_window_longer_than_the_model_is_refused(gossamer, bert_folder, tmp_path):
    result = gossamer("pack", bert_folder, "--out", tmp_path / "p", "--tokens", 65)
    assert result.exit_code == 3
    assert "64" in result.stderr
    assert gossamer("bench", bert_folder, "--threads", "0").exit_code == 3


def finished(work: Path) -> int:
    return len(list(work.glob("*.pruned.safetensors")))


def test_a_killed_run_goes_on_and_ends_the_same(gossamer, text_file, tmp_path):
    model, out = llama(tmp_path / "model", width=64, layers=8), tmp_path / "out"
    args = ["prune", model, "--method", "sparsegpt", "--sparsity", 0.5, "--data", text_file]
    args += ["--samples", 8, "--length", 32, "--out"]
    order = [sys.executable, "-m", "gossamer", *map(str, args), str(out)]
    run = subprocess.Popen(order, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while finished(out / ".work") < 5 and run.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = finished(out / ".work")
    assert 5 <= before < 56, f"the run was to be killed in the middle; {before} of 56 layers were finished"
    assert not (out / "model.safetensors").exists()

    other = gossamer(*args, out, "--seed", 1)
    assert other.exit_code == 3
    assert "seed" in other.stderr

    resumed = gossamer(*args, out, "--json")
    held = json.loads(resumed.stdout)
    assert held["resumed_layers"] == before
    record(gossamer(*args, tmp_path / "whole", "--json"))
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not (out / ".work").exists()
