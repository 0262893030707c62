"""Models that stay in their shards: pruned to the bit as in memory, and written whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.attach.shelf import shelf_of
from gossamer.core.errors import FileDamaged, NonFiniteError, TargetError

transformers = pytest.importorskip("transformers")

SIZE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
GROUPED = SIZE | dict(num_key_value_heads=2)
MOE = GROUPED | dict(num_local_experts=4, num_experts_per_tok=2)
SMALL = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | dict(head_dim=8)),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", MOE),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        dict(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
        ),
    ),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    "BERT": ("BertForMaskedLM", "BertConfig", SIZE),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in SIZE.items() if k != "vocab_size"} | dict(image_size=16, patch_size=4),
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SMALL
        | dict(vocab_size=64, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, num_mel_bins=8)
        | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    ),
}


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> type:
    """A generated checkpoint in several shards; its class."""
    name, config, options = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    kind(getattr(transformers, config)(**options)).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text("{}")
    return kind


def batches(family: str, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = lambda: torch.randint(3, 64, (2, 24), generator=g)
    if family == "ViT":
        return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=g).to(dtype)} for _ in range(3)]
    if family == "Whisper":
        hear = lambda: torch.randn(2, 8, 40, generator=g).to(dtype)
        return [{"input_features": hear(), "decoder_input_ids": ids()[:, :9]} for _ in range(3)]
    both = {"T5": lambda: {"input_ids": ids(), "decoder_input_ids": ids()}}
    return [both.get(family, lambda: {"input_ids": ids()})() for _ in range(3)]


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    theirs = b.state_dict()
    return [n for n, w in a.state_dict().items() if not torch.equal(w, theirs[n])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "sequential"), [("sparsegpt", "layer"), ("wanda", "block")])
def test_on_disk_is_in_memory_to_the_bit(family: str, method: str, sequential: str, tmp_path: Path) -> None:
    kind = saved(family, tmp_path / "dense")
    how = dict(density=0.5, data=batches(family), sequential=sequential)
    near = kind.from_pretrained(tmp_path / "dense", dtype="auto")
    want = gossamer.prune(near, method, **how)
    got = gossamer.prune_files(tmp_path / "dense", tmp_path / "out", method, **how)
    assert [(r.name, r.kept) for r in got.layers] == [(r.name, r.kept) for r in want.layers]
    assert got.skipped == want.skipped and got.density == pytest.approx(0.5, abs=0.02)
    assert differing(near, kind.from_pretrained(tmp_path / "out", dtype="auto")) == []
    layout = lambda folder: sorted(p.name for p in folder.iterdir() if p.name != "gossamer-prune.json")
    assert layout(tmp_path / "out") == layout(tmp_path / "dense")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def test_bfloat16_and_methods_without_data(tmp_path: Path) -> None:
    kind = saved("Llama", tmp_path / "dense", torch.bfloat16)
    near = kind.from_pretrained(tmp_path / "dense", dtype="auto")
    gossamer.prune(near, "magnitude", pattern="2:4")
    report = gossamer.prune_files(tmp_path / "dense", tmp_path / "out", "magnitude", pattern="2:4")
    far = kind.from_pretrained(tmp_path / "out", dtype="auto")
    assert differing(near, far) == [] and far.dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "gossamer-prune.json").read_text())["density"] == report.density == 0.5


def test_a_model_on_disk_answers_like_one_in_memory_and_holds_one_block(tmp_path: Path) -> None:
    kind = saved("Llama", tmp_path)
    far, near = gossamer.on_disk(tmp_path), kind.from_pretrained(tmp_path, dtype="auto")
    batch = batches("Llama")[0]
    with torch.no_grad():
        assert torch.equal(far(**batch).logits, near(**batch).logits)
    loaded = {shelf_of(far).block_of(n) for n, p in far.named_parameters() if not p.is_meta}
    assert loaded == {"", "model.layers.1"}


def test_experts_fused_into_one_tensor_are_listed(tmp_path: Path) -> None:
    saved("Mixtral", tmp_path / "dense")
    report = gossamer.prune_files(tmp_path / "dense", tmp_path / "out", "magnitude", density=0.5)
    assert "4 experts fused" in dict(report.skipped)["model.layers.1.mlp.experts.gate_up_proj"]


def test_what_needs_the_whole_model_is_refused(tmp_path: Path) -> None:
    saved("Llama", tmp_path / "dense")
    go = lambda method, **how: gossamer.prune_files(tmp_path / "dense", tmp_path / "out", method, density=0.5, **how)
    for method, how in [("global_magnitude", {}), ("wanda", {"allocation": "sensitivity", "data": batches("Llama")})]:
        with pytest.raises(TargetError, match="all layers at once"):
            go(method, **how)
    with pytest.raises(TargetError, match="workdir"):
        gossamer.prune(gossamer.on_disk(tmp_path / "dense"), "magnitude", density=0.5)
    (tmp_path / "out").mkdir()
    with pytest.raises(TargetError, match="exists"):
        go("magnitude")


@pytest.mark.parametrize("harm", ["cut", "missing", "header", "nothing"])
def test_a_damaged_shard_is_named_before_any_work(harm: str, tmp_path: Path) -> None:
    saved("Llama", tmp_path / "dense")
    shard = sorted((tmp_path / "dense").glob("*.safetensors"))[2]
    raw = shard.read_bytes()
    if harm == "missing":
        shard.unlink()
    else:
        shard.write_bytes({"cut": raw[:-10], "header": raw[:8] + b"x" + raw[9:], "nothing": b""}[harm])
    with pytest.raises(FileDamaged, match=shard.name):
        gossamer.prune_files(tmp_path / "dense", tmp_path / "out", "magnitude", density=0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_a_weight_that_is_not_finite_is_named_with_its_file_and_finished_layers_stay(tmp_path: Path) -> None:
    saved("Llama", tmp_path / "dense")
    entry = shelf_of(gossamer.on_disk(tmp_path / "dense")).entries["model.layers.1.self_attn.k_proj.weight"]
    with open(entry.file, "r+b") as handle:
        handle.seek(entry.start)
        handle.write(b"\x00\x00\xc0\x7f")  # NaN
    with pytest.raises(NonFiniteError, match=rf"layers\.1\.self_attn\.k_proj.*{entry.file.name}"):
        gossamer.prune_files(tmp_path / "dense", tmp_path / "out", "wanda", density=0.5, data=batches("Llama"))
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.work").glob("*layers.0*"))) == 7


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, {here!r})
from test_on_disk import batches, gossamer
torch.set_num_threads(1)
for at in (1, 8):
    def die(name, done, total):
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()  # before any work, so that no thread is lost
    if not child:
        how = dict(density=0.5, data=batches("Llama"), progress=die)
        gossamer.prune_files({folder!r} + "/dense", {folder!r} + f"/{{at}}", "sparsegpt", **how)
    print(os.waitpid(child, 0)[1])
"""


def test_kill_minus_nine_at_any_block_and_the_same_bits_afterwards(tmp_path: Path) -> None:
    kind = saved("Llama", tmp_path / "dense")
    how = dict(density=0.5, data=batches("Llama"))
    gossamer.prune_files(tmp_path / "dense", tmp_path / "whole", "sparsegpt", **how)
    script = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert out.stdout.split() == [str(int(signal.SIGKILL))] * 2, out.stderr
    whole = kind.from_pretrained(tmp_path / "whole", dtype="auto")
    for at in (1, 8):
        assert not (tmp_path / str(at)).exists()
        report = gossamer.prune_files(tmp_path / "dense", tmp_path / str(at), "sparsegpt", **how)
        assert sum(r.resumed for r in report.layers) == at
        assert differing(whole, kind.from_pretrained(tmp_path / str(at), dtype="auto")) == []
