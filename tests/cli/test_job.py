"""One recipe, one job: pruned, recovered, evaluated, packed and reported; stopped anywhere, it goes on."""

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
STAGES = ("pruned", "recovered", "packed", "report.html")
RECIPE = """\
model: hf:{model}
method: sparsegpt
density: 0.5
data: {text}
samples: 4
length: 16
recover: {{steps: 6, lr: 3e-3, batch: 2, samples: 8, save_every: 0}}
evaluate: {{data: {text}, windows: 3, length: 16, prompts: ["word1 word2", word3], tokens: 5}}
pack: {{tokens: 8}}
"""


@pytest.fixture
def recipe(llama_folder, text_file, tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=llama_folder, text=text_file))
    return file


@pytest.fixture(scope="module")
def whole(llama_folder, text_file, tmp_path_factory) -> Path:
    """A job that nothing has stopped."""
    where = tmp_path_factory.mktemp("whole")
    (where / "recipe.yaml").write_text(RECIPE.format(model=llama_folder, text=text_file))
    subprocess.run(command(where / "recipe.yaml", where / "job"), env=environment(), check=True, capture_output=True)
    return where / "job"


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "gossamer", "prune", "--recipe", str(recipe), "--out", str(out), "--json"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GOSSAMER_TRACEBACK": "1"}


def weights(job: Path) -> dict[str, torch.Tensor]:
    return load_file(job / "recovered" / "model.safetensors")


def test_all_stages_and_what_the_report_tells(whole, llama_folder):
    before, after = load_file(whole / "pruned" / "model.safetensors"), weights(whole)
    for name, w in after.items():
        if "_proj" in name:
            assert float((w == 0).float().mean()) == 0.5 and torch.equal(w == 0, before[name] == 0)
            assert not torch.equal(w, before[name])
    held = json.loads((whole / "run.json").read_text())
    quality = {s["name"]: s["quality"]["perplexity"] for s in held["settings"]}
    assert list(quality) == ["dense", "pruned", "recovered"] and quality["recovered"] < quality["pruned"]
    assert [s["density"] for s in held["settings"]] == [1.0, 0.5, 0.5]
    assert [s["prompt"] for s in held["samples"]] == ["word1 word2", "word3"]
    assert all(len(text.split()) == 5 for s in held["samples"] for text in s["texts"].values())
    assert {r["name"].rpartition(".")[2] for r in held["layers"]} >= {"q_proj", "down_proj"}
    page = (whole / "report.html").read_text()
    assert "In their own words" in page and "word1 word2" in page and str(round(quality["dense"], 2))[:4] in page

    from transformers import AutoModelForCausalLM

    import gossamer

    ids = torch.tensor([[1, 2, 3]])
    model = AutoModelForCausalLM.from_pretrained(whole / "recovered")
    torch.testing.assert_close(gossamer.load(whole / "packed")(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_finished_job_is_read_back_and_another_recipe_refused(gossamer, whole, llama_folder, text_file, tmp_path):
    file = tmp_path / "recipe.yaml"
    text = RECIPE.format(model=llama_folder, text=text_file)
    file.write_text(text)
    times = {s: (whole / s).stat().st_mtime_ns for s in STAGES}
    held = record(gossamer("prune", "--recipe", file, "--out", whole, "--json"))
    assert set(held["done"]) == set(STAGES) and set(held["quality"]) == {"dense", "pruned", "recovered"}
    assert {s: (whole / s).stat().st_mtime_ns for s in STAGES} == times
    file.write_text(text.replace("steps: 6", "steps: 7"))
    result = gossamer("prune", "--recipe", file, "--out", whole)
    assert result.exit_code == 3 and "job with recover" in " ".join(result.stderr.split())
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    result = gossamer("prune", "--recipe", file, "--out", other, "--overwrite")
    assert result.exit_code == 3 and (other / "thesis.txt").read_text() == "mine"


SIGNS = (".work/recover.safetensors", ".work/judged-dense.json")


def test_killed_while_recovering_and_while_evaluating_it_ends_with_the_same_model(whole, recipe, tmp_path):
    """kill -9 as soon as the stage shows a sign of life, then the same command; the last one runs to the end."""
    out = tmp_path / "job"
    for sign in SIGNS:
        run = subprocess.Popen(
            command(recipe, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not (out / sign).exists() and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    done = subprocess.run(command(recipe, out), env=environment(), check=True, capture_output=True, text=True)
    assert set(json.loads(done.stdout)["done"]) == set(STAGES) and "Going on with the job" in done.stderr
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[name], w) for name, w in theirs.items())
    figures = [json.loads((job / "run.json").read_text())["settings"] for job in (out, whole)]
    assert [s["quality"] for s in figures[0]] == [s["quality"] for s in figures[1]]


def test_ctrl_c_while_recovering_saves_the_step(gossamer, recipe, tmp_path, monkeypatch):
    from gossamer.recipes.recovering import Recovering

    advance, steps = Recovering.advance, []

    def stop_at_three(self, scale):
        advance(self, scale)
        steps.append(len(self.losses))
        if len(steps) == 3:
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)  # see tests/api/test_recover.py

    monkeypatch.setattr(Recovering, "advance", stop_at_three)
    recipe.write_text(recipe.read_text().split("evaluate:")[0])  # two stages are a job too
    assert gossamer("prune", "--recipe", recipe, "--out", tmp_path / "job").exit_code == 130
    held = record(gossamer("prune", "--recipe", recipe, "--out", tmp_path / "job", "--json"))
    assert steps == [1, 2, 3, 4, 5, 6] and set(held["done"]) == {"pruned", "recovered"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("recover: {step: 3}", "'steps'"),
        ("recover: 3", "needs a mapping"),
        ("recover: {lr: fast}", "needs a number"),
        ("recover: {steps: -3}", "0 or more"),
        ("recover: {clock: moon}", "wall or processor"),
        ("evaluate: {prompts: 3}", "text or a list"),
        ("evaluate: {windows: 2}", "no held-out text"),
        ("evaluate: {data: asset:trec}", "no held-out text"),
        ("recover: {}", "recovery reads texts"),
    ],
)
def test_a_wrong_stage_is_refused(gossamer, llama_folder, tmp_path, line, says):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {llama_folder}\nmethod: magnitude\n{line}\n")
    result = gossamer("prune", "--recipe", file, "--out", tmp_path / "o")
    assert result.exit_code == 3 and says in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "o").exists()  # before any work


def test_zero_shot_without_lm_eval_is_refused_before_any_work(gossamer, llama_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: {llama_folder}\nmethod: magnitude\nevaluate: {{data: {text_file}, zero_shot: 5}}\n")
    result = gossamer("prune", "--recipe", file, "--out", tmp_path / "o")
    assert result.exit_code == 4 and "gossamer[eval]" in result.stderr and not (tmp_path / "o").exists()


def test_zero_shot_accuracies_stand_beside_the_perplexity(gossamer, llama_folder, text_file, tmp_path, monkeypatch):
    from gossamer.integrations import lm_eval

    score = lm_eval.ZeroShot(0.25, 0.1, 5, 0.5)
    monkeypatch.setattr(lm_eval, "zero_shot", lambda model, tokenizer, count: {"trec": score})
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)  # anything that can be imported
    file = tmp_path / "recipe.yaml"
    how = f"{{data: {text_file}, windows: 1, length: 8, zero_shot: 5}}"
    file.write_text(f"model: {llama_folder}\nmethod: magnitude\nevaluate: {how}\n")
    held = record(gossamer("prune", "--recipe", file, "--out", tmp_path / "o", "--json"))
    assert held["quality"]["pruned"]["trec accuracy, 5 texts"] == 0.25
    assert "trec accuracy, 5 texts" in (tmp_path / "o" / "report.html").read_text()


def test_bfloat16_is_recovered_in_float32_and_stored_as_it_came(gossamer, text_file, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = llama(tmp_path / "model", width=16, layers=1)
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    file = tmp_path / "recipe.yaml"
    text = f"model: {folder}\nmethod: magnitude\nrecover: {{steps: 2, samples: 2, length: 8, data: {text_file}}}\n"
    file.write_text(text)
    record(gossamer("prune", "--recipe", file, "--out", tmp_path / "job", "--json"))
    assert {w.dtype for w in weights(tmp_path / "job").values()} == {torch.bfloat16}
