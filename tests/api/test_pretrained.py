"""save_pretrained and load_pretrained: every class and format comes back exact, others read it, damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer.core.errors import FileDamaged, FormatError, GossamerError, TargetError, UnknownName
from gossamer.deploy import report_of
from gossamer.deploy.examples import call, tensors
from gossamer.formats import Int4Groups
from gossamer.formats.layouts import SPARSE_24_BITMASK, SPARSE_BITMASK
from gossamer.integrations import shards
from gossamer.integrations.pretrained import read_config
from gossamer.integrations.reading import unfolded
from gossamer.integrations.transformers import register
from gossamer.nn import PackedLinear

t = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {**SMALL, "vocab_size": 60}
MAKE = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**WORDS)),
    "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**WORDS, tie_word_embeddings=True)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=60)
    ),
    "bert": lambda: t.BertModel(t.BertConfig(**WORDS)),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=60)
    ),
    "vit": lambda: t.ViTModel(t.ViTConfig(**SMALL, image_size=32, patch_size=8)),
    "mixtral": lambda: t.MixtralForCausalLM(
        t.MixtralConfig(**WORDS, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    ),
}


def pruned(kind, pattern="unstructured", dtype=torch.float32):
    """A tiny model with random weights, half of them zero."""
    torch.manual_seed(0)
    model = MAKE[kind]().eval().to(dtype)
    gossamer.prune(model, "magnitude", density=0.5, pattern=pattern)
    return model


def example(kind):
    if kind == "vit":
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    ids = torch.arange(9).view(1, 9)
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "t5" else {"input_ids": ids}


def same_weights(a, b):
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def same_outputs(a, b, kind):
    first, second = tensors(call(a, example(kind))), tensors(call(b, example(kind)))
    return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(first, second, strict=True))


def plain(model, folder):
    """The folder as transformers itself loads it."""
    loaded, told = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values())
    return loaded


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_transformers_reads_what_was_pruned(kind, form, tmp_path):
    model = pruned(kind)
    folder = gossamer.save_pretrained(model, tmp_path / "m", format=form, max_shard_size=20_000)
    assert len(shards.shards(folder)) > 1 and not list(folder.glob("*.bin"))
    register()  # importing it did so already; twice does nothing
    back = plain(model, folder)
    assert same_weights(back, model) and same_outputs(back, model, kind)
    record = back.config.gossamer
    assert record["density"] == pytest.approx(0.5, abs=0.02) and len(record["layers"]) >= 8
    back.save_pretrained(tmp_path / "again")  # as any dense model
    assert same_weights(plain(model, tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_files_are_smaller_and_bfloat16_survives(dtype, tmp_path):
    model = pruned("tied", dtype=dtype)
    sizes = {}
    for form in ("dense", "packed"):
        folder = gossamer.save_pretrained(model, tmp_path / form, format=form)
        sizes[form] = sum(f.stat().st_size for f in shards.shards(folder))
        back = gossamer.load_pretrained(folder, dense=True)
        assert same_weights(back, model) and next(back.parameters()).dtype is dtype
        assert back.lm_head.weight is back.model.embed_tokens.weight
    assert sizes["packed"] < 0.9 * sizes["dense"]


@pytest.mark.parametrize("kind", ["tied", "gpt2", "vit"])
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_packed_layers_come_back_as_they_were(kind, form, tmp_path):
    model = pruned(kind)
    packed = gossamer.pack(model, example(kind), candidates=["csr/cpu"], repeats=1)
    folder = gossamer.save_pretrained(packed, tmp_path / "m", format=form)
    assert same_weights(plain(model, folder), model)
    loaded = gossamer.load_pretrained(folder)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in packed.modules()]
    assert same_outputs(loaded, packed, kind) and report_of(loaded) == report_of(packed)
    assert all(m.plan.kernel == "csr/cpu" or m.backend for m in loaded.modules() if isinstance(m, PackedLinear))


def test_a_model_that_was_only_pruned_is_packed_when_it_is_loaded(tmp_path):
    model = pruned("llama", "2:4")
    loaded = gossamer.load_pretrained(gossamer.save_pretrained(model, tmp_path / "m", format="packed"))
    assert report_of(loaded).layers[0].structure == "2:4"
    assert read_config(tmp_path / "m")["gossamer"]["layers"]["model.layers.0.mlp.up_proj"]["structure"] == "2:4"
    folder = gossamer.save_pretrained(pruned("vit"), tmp_path / "v")
    with pytest.raises(TargetError, match="pixel_values"):
        gossamer.load_pretrained(folder)
    assert report_of(gossamer.load_pretrained(folder, example=example("vit")))


def test_the_report_of_prune_is_noted(tmp_path):
    model = MAKE["llama"]()
    report = gossamer.prune(model, "magnitude", density=0.25)
    gossamer.save_pretrained(model, tmp_path / "m", report=report)
    record = read_config(tmp_path / "m")["gossamer"]
    assert record["method"] == report.method and record["density"] == pytest.approx(report.density)


def test_without_gossamer_transformers_stops_and_names_the_import(tmp_path):
    folder = gossamer.save_pretrained(pruned("tied"), tmp_path / "m", format="packed")
    program = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode != 0 and "mismatch" in run.stderr
    assert "Unknown quantization type, got gossamer.integrations.transformers" in run.stderr


@pytest.mark.parametrize("kind", ["tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("layout", [SPARSE_BITMASK, SPARSE_24_BITMASK], ids=lambda x: x.name)
def test_files_of_compressed_tensors_come_back(kind, layout, tmp_path):
    model = pruned(kind, "2:4")
    if kind == "gpt2" and layout is SPARSE_24_BITMASK:
        # Conv1D stores its weight turned, and the fours of the layout run along its rows.
        with pytest.raises(FormatError, match=r"h\.0\..*more than two"):
            gossamer.save_pretrained(model, tmp_path / "m", format=layout.name)
        assert not (tmp_path / "m").exists()
        return
    folder = gossamer.save_pretrained(model, tmp_path / "m", format=layout.name, max_shard_size=20_000)
    assert same_weights(gossamer.load_pretrained(folder, dense=True), model)
    settings = read_config(folder)["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and settings["sparsity_config"]["format"] == layout.name
    assert set(settings["sparsity_config"]["targets"]) <= {n.removesuffix(".weight") for n in unfolded(folder, layout)}


def test_two_of_four_refuses_what_is_denser(tmp_path):
    with pytest.raises(FormatError, match=r"down_proj.*prune with pattern='2:4'"):
        gossamer.save_pretrained(pruned("llama"), tmp_path / "m", format="sparse-24-bitmask")
    assert not list(tmp_path.iterdir())


def damage(folder, how):
    file = shards.shards(folder)[1]
    raw = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(raw[:-40])
    elif how == "altered":
        raw[-5] ^= 1
        file.write_bytes(raw)
    else:
        file.unlink()
    return file.name


@pytest.mark.parametrize("form", ["dense", "packed", "sparse-bitmask"])
@pytest.mark.parametrize("how", ["cut", "altered", "missing"])
def test_a_damaged_shard_is_named(form, how, tmp_path):
    folder = gossamer.save_pretrained(pruned("llama"), tmp_path / "m", format=form, max_shard_size=20_000)
    name = damage(folder, how)
    with pytest.raises(FileDamaged, match=name):
        gossamer.load_pretrained(folder)
    if form == "packed":
        with pytest.raises((FileDamaged, OSError), match=name):
            t.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_without_checksums_cut_files_are_still_refused(form, tmp_path):
    folder = gossamer.save_pretrained(pruned("llama"), tmp_path / "m", format=form, max_shard_size=20_000)
    damage(folder, "cut")
    (folder / shards.SIDECAR).unlink()
    with pytest.raises(FileDamaged, match="restore it or save"):
        gossamer.load_pretrained(folder)


def test_records_that_do_not_fit_are_refused(tmp_path):
    folder = gossamer.save_pretrained(pruned("llama"), tmp_path / "m")
    config = read_config(folder)
    config["gossamer"]["layers"]["model.layers.0.mlp.up_proj"]["kept"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileDamaged, match=r"layers\.0\.mlp\.up_proj.*keeps"):
        gossamer.load_pretrained(folder, dense=True)
    (folder / "config.json").write_text("{")
    with pytest.raises(FileDamaged, match=r"config\.json"):
        gossamer.load_pretrained(folder)
    side = folder / shards.SIDECAR
    side.write_text(side.read_text().replace("gossamer", "gossamar", 1))
    with pytest.raises(FileDamaged, match="altered"):
        shards.verify(folder)
    with pytest.raises(FileDamaged, match=r"holds no config\.json"):
        gossamer.load_pretrained(tmp_path)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    model = pruned("llama")
    folder = gossamer.save_pretrained(model, tmp_path / "m")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(GossamerError, match="could not be written"):
        gossamer.save_pretrained(model, folder, format="packed")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_saved_so_is_refused(tmp_path):
    model = pruned("llama")
    with pytest.raises(UnknownName, match="packed"):
        gossamer.save_pretrained(model, tmp_path / "m", format="paked")
    with pytest.raises(TargetError, match=r"gossamer\.save"):
        gossamer.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "m")
    with torch.device("meta"), pytest.raises(TargetError, match="meta device"):
        gossamer.save_pretrained(MAKE["llama"](), tmp_path / "m")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(GossamerError, match="choose a new folder"):
        gossamer.save_pretrained(model, tmp_path / "mine")
    model.model.layers[0].mlp.up_proj = PackedLinear.from_linear(model.model.layers[0].mlp.up_proj, Int4Groups)
    with pytest.raises(TargetError, match="4-bit"):
        gossamer.save_pretrained(model, tmp_path / "m")


class Quantizer:
    """What loading from GGUF leaves on a model."""

    def __init__(self, method):
        self.quantization_config = type("C", (), {"quant_method": method})()

    def is_serializable(self):
        return False

    def remove_quantization_config(self, model):
        del model.hf_quantizer


def test_what_gguf_left_is_taken_off_and_other_quantisers_are_refused(tmp_path):
    model = pruned("llama")
    model.hf_quantizer = Quantizer("gguf")
    assert same_weights(plain(model, gossamer.save_pretrained(model, tmp_path / "m")), model)
    model.hf_quantizer = Quantizer("bitsandbytes")
    with pytest.raises(TargetError, match="bitsandbytes"):
        gossamer.save_pretrained(model, tmp_path / "n")
    model.hf_quantizer = Quantizer("gguf")
    model.model.norm.__class__ = type("GgufLinear", (type(model.model.norm),), {})
    with pytest.raises(TargetError, match="dequantize=True"):
        gossamer.save_pretrained(model, tmp_path / "n")


def test_a_folder_that_transformers_saved_is_read_too(tmp_path):
    model = pruned("llama")
    model.save_pretrained(tmp_path / "m")
    assert same_weights(gossamer.load_pretrained(Path(tmp_path / "m"), dense=True), model)
