"""Folders against compressed-tensors 0.14 itself, which the `test` extra cannot hold: it wants transformers 4.

Run in an environment with `pip install --no-deps compressed-tensors==0.14.0.1` and loguru; it read our folders and we
its, on 2026-11-26 with transformers 5.23.0 (only its own readers and writers were used).
"""

import json

import pytest
import torch

import gossamer

transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("compressed_tensors", reason="needs compressed-tensors 0.14 in an environment of its own")
pytestmark = pytest.mark.skipif(not theirs.__version__.startswith("0.14."), reason="0.15 removed the sparse formats")


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval().bfloat16()


def compressor(folder):
    from compressed_tensors.compressors import ModelCompressor

    return ModelCompressor.from_compression_config(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", ["sparse-bitmask", "sparse-24-bitmask"])
def test_it_reads_ours_and_we_read_its(form, tmp_path):
    from safetensors.torch import save_file

    model = llama()
    gossamer.prune(model, "magnitude", pattern="2:4")
    folder = gossamer.save_pretrained(model, tmp_path / "ours", format=form, max_shard_size=20_000)
    reader, fresh = compressor(folder), llama(seed=1)
    reader.decompress(str(folder), fresh)
    assert same(fresh.state_dict(), model.state_dict())
    its = tmp_path / "its"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(its)
    packed = {name: t.contiguous() for name, t in reader.compress(model).items()}
    save_file(packed, its / "model.safetensors", metadata={"format": "pt"})
    reader.update_config(str(its))
    assert any(name.endswith(".bitmask") for name in packed)
    assert same(gossamer.load_pretrained(its, dense=True).state_dict(), model.state_dict())
