"""compile on the architectures people have: tiny models of transformers' classes, pruned in row groups."""

from __future__ import annotations

import pytest
import torch
from test_runtime import CLOSE, thin
from torch import nn

import gossamer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}


def text(batch: int, length: int, *, masked: bool) -> dict:
    ids = torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


def _gpt2(t) -> nn.Module:
    return t.GPT2Model(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64))


def _llama(t) -> nn.Module:
    return t.LlamaModel(t.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64))


def _opt(t) -> nn.Module:
    sizes = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    return t.OPTModel(t.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64))


def _bert(t) -> nn.Module:
    return t.BertModel(t.BertConfig(**SMALL, max_position_embeddings=64))


def _distilbert(t) -> nn.Module:
    return t.DistilBertModel(t.DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=64))


def _t5(t) -> nn.Module:
    return t.T5EncoderModel(t.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=64))


# Which operators run on panels, and how many: attention with T5's biases does not.
MODELS = {
    "bert": (_bert, True, {"attention, 4 heads": 2, "layer norm": 4}),
    "distilbert": (_distilbert, True, {"attention, 4 heads": 2, "layer norm": 4}),
    "gpt2": (_gpt2, False, {"attention, 4 heads": 2, "layer norm": 4}),
    "llama": (_llama, False, {"attention, 4 heads": 2, "RMS norm": 4, "rotary": 4, "multiply": 2}),
    "opt": (_opt, True, {"attention, 4 heads": 2, "layer norm": 4}),
    "t5": (_t5, False, {"RMS norm": 4}),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_language_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    make, masked, wanted = MODELS[name]
    torch.manual_seed(0)
    model = thin(make(transformers))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    fast = gossamer.compile(model, text(2, 9, masked=masked))
    for batch, length in ((2, 9), (1, 5), (3, 20)):
        call = text(batch, length, masked=masked)
        got, want = fast(**call).last_hidden_state, model(**call).last_hidden_state
        # What a model computes at hidden positions is its own affair.
        seen = call["attention_mask"].bool() if masked else torch.ones(batch, length, dtype=torch.bool)
        torch.testing.assert_close(got[seen], want[seen], **CLOSE)
    told = fast.explain(text(2, 9, masked=masked))
    for what, count in wanted.items():
        assert told.count(what) >= count, told


@torch.no_grad()
def test_a_vision_transformer() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    model = thin(transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8)))
    fast = gossamer.compile(model, {"pixel_values": torch.randn(1, 3, 32, 32)})
    for images in (1, 3):
        x = torch.randn(images, 3, 32, 32)
        got, want = fast(pixel_values=x), model(pixel_values=x)
        torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, **CLOSE)
        torch.testing.assert_close(got.pooler_output, want.pooler_output, **CLOSE)
