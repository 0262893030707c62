"""Wanda over whole blocks: the same weights are cut as by the official procedure, written out block by block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gossamer
from benchmarks.smollm.official import prune_blocks

transformers = pytest.importorskip("transformers")


def test_supports_are_those_of_the_official_procedure() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    windows = torch.randint(64, (4, 24))
    twin, ours = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        prune_blocks(twin, windows, "wanda")
    gossamer.prune(ours, "wanda", density=0.5, data=[{"input_ids": ids[None]} for ids in windows])
    by_layers = copy.deepcopy(model)
    gossamer.prune(
        by_layers, "wanda", density=0.5, data=[{"input_ids": ids[None]} for ids in windows], sequential="layer"
    )
    layers = [n for n, m in model.model.named_modules() if isinstance(m, nn.Linear)]
    kept = lambda net: [net.model.get_submodule(n).weight != 0 for n in layers]
    assert all(torch.equal(a, b) for a, b in zip(kept(twin), kept(ours), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept(twin), kept(by_layers), strict=True))
