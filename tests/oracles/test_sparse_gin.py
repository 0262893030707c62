"""Sparse GIN attention against a loop over tokens, and values worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional

from gossamer.core.errors import BudgetError, TargetError
from gossamer.methods.finetuning.sparse_gin import sparse_gin
from gossamer.nn import SparseGIN
from gossamer.nn.gin import adjacency, widest


def attention(batch: int, heads: int, tokens: int, *, causal: bool, seed: int = 0) -> torch.Tensor:
    scores = 3 * torch.randn(batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


def edge(heads: list[float]) -> float:
    weight = 1 / (1 + math.exp(-10 * (min(sum(heads), 1.0) - 0.1)))
    return weight if weight > 0.6 else 0.0


@pytest.mark.parametrize("causal", [True, False])
def test_edges_against_a_loop(causal):
    a = attention(2, 3, 5, causal=False)
    ours = adjacency(a, causal=causal)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                expected = 0.0 if causal and j > i else edge(a[b, :, i, j].tolist())
                assert ours[b, i, j].item() == pytest.approx(expected, rel=1e-5)
    assert 0 < (ours == 0).float().mean() < 1


def test_an_edge_stands_above_the_limit_only():
    limit = 0.1 + math.log(1.5) / 10
    a = torch.tensor([[[[limit - 1e-3, limit + 1e-3], [0.05, 0.95]]]])
    assert (adjacency(a, causal=False) != 0).tolist() == [[[False, True], [False, True]]]


@pytest.mark.parametrize("causal", [True, False])
def test_messages_against_a_loop(causal):
    torch.manual_seed(0)
    gin = SparseGIN(6, 4, scale=0.3, causal=causal).eval()
    gin.epsilon.data.fill_(0.7)
    x, a = torch.randn(2, 5, 6), attention(2, 3, 5, causal=causal)
    prelu = lambda z: torch.where(z > 0, z, gin.activation.weight * z)
    for b in range(2):
        for i in range(5):
            z = 0.7 * functional.linear(x[b, i], gin.down.weight, gin.down.bias)
            for j in range(5):
                if not (causal and j > i):
                    z = z + edge(a[b, :, i, j].tolist()) * functional.linear(x[b, j], gin.down.weight, gin.down.bias)
            z = z + gin.second(prelu(gin.first(z)))
            out = gin.up(prelu(z))
            out = out / (out.square().mean() + 1e-5).sqrt() * gin.norm.weight
            torch.testing.assert_close(gin(x, a)[b, i], x[b, i] + 0.3 * out, atol=1e-5, rtol=1e-5)


def test_later_tokens_change_nothing_before_them():
    torch.manual_seed(0)
    gin, a = SparseGIN(6, 4).eval(), attention(1, 2, 6, causal=True)
    x = torch.randn(1, 6, 6)
    other = x.clone()
    other[:, 4:] += 1
    torch.testing.assert_close(gin(x, a)[:, :4], gin(other, a)[:, :4], atol=0, rtol=0)
    assert not torch.equal(gin(x, a)[:, 4:], gin(other, a)[:, 4:])


@pytest.mark.parametrize("width, hidden", [(6, 1), (6, 4), (384, 14)])
def test_numbers_and_the_widest_within_them(width, hidden):
    count = SparseGIN.numbers(width, hidden)
    assert sum(p.numel() for p in SparseGIN(width, hidden).parameters()) == count
    assert (widest(width, count), widest(width, count - 1)) == (hidden, hidden - 1) and widest(width, 3) == 0


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)).eval()


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


models = pytest.mark.parametrize("build", [llama, bert])
IDS = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
out = lambda model, ids=IDS, **more: model(input_ids=ids, **more).last_hidden_state


def test_llama_layer_by_layer():
    """The layer's own parts called by hand, with the graph network between them."""
    model, plain = llama(), llama()
    plain.set_attn_implementation("eager")
    graphs = sparse_gin(hidden=5, first=0.4, last=0.8).on(model)
    networks = list(graphs.networks().values())
    assert [gin.scale.item() for gin in networks] == pytest.approx([0.4, 0.8])
    x = plain.embed_tokens(IDS)
    places = plain.rotary_emb(x, torch.arange(7)[None])
    later = torch.full((7, 7), -math.inf).triu(1)[None, None]
    for layer, gin in zip(plain.layers, networks):
        y, a = layer.self_attn(layer.input_layernorm(x), position_embeddings=places, attention_mask=later)
        x = gin(x + y, a)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(out(model), plain.norm(x), atol=1e-5, rtol=1e-4)


def test_bert_layer_by_layer():
    model, plain = bert(), bert()
    plain.set_attn_implementation("eager")
    networks = list(sparse_gin(hidden=5, first=0.4, last=0.8).on(model).networks().values())
    x = plain.embeddings(IDS)
    for layer, gin in zip(plain.encoder.layer, networks):
        x = gin(*layer.attention(x))
        x = layer.output(layer.intermediate(x), x)
    torch.testing.assert_close(out(model), x, atol=1e-5, rtol=1e-4)


@models
def test_only_the_networks_learn_and_remove_gives_the_model_back(build):
    model, plain = build(), build()
    graphs = sparse_gin(hidden=5).on(model)
    assert (
        graphs.trainable
        == 2 * SparseGIN.numbers(16, 5)
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(graphs.parameters(), 1e-2)
    goal, losses = torch.randn(2, 7, 16), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = functional.mse_loss(out(model), goal)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    other = build()
    sparse_gin(hidden=5, seed=3).on(other)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    torch.testing.assert_close(out(other), out(model), atol=0, rtol=0)
    graphs.remove()
    torch.testing.assert_close(out(model), out(plain), atol=0, rtol=0)
    assert all(p.requires_grad for p in model.parameters()) and model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(out(twin), out(other), atol=0, rtol=0)


def test_later_tokens_change_nothing_before_them_in_a_whole_model():
    model = llama()
    sparse_gin(hidden=5, first=0.5).on(model)
    torch.testing.assert_close(out(model)[:, :4], out(model, IDS[:, :4]), atol=1e-6, rtol=1e-5)


def test_padding_sends_no_messages():
    model = bert()
    sparse_gin(hidden=5, first=0.5).on(model)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[:, 5:] = 0
    padded = out(model, attention_mask=mask)[:, :5]
    torch.testing.assert_close(padded, out(model, IDS[:, :5]), atol=1e-6, rtol=1e-5)


def test_bad_input():
    with pytest.raises(BudgetError, match="a width of 1 or more"):
        sparse_gin(hidden=0)
    with pytest.raises(TargetError, match="Sequential has none"):
        sparse_gin().on(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model = llama()
    sparse_gin(hidden=2).on(model)
    with pytest.raises(TargetError, match="graph networks already"):
        sparse_gin(hidden=2).on(model)
    first = model(input_ids=IDS, use_cache=True)
    with pytest.raises(TargetError, match="use_cache=False"):
        model(input_ids=IDS[:, :1], past_key_values=first.past_key_values, use_cache=True)
    model.set_attn_implementation("sdpa")
    with pytest.raises(TargetError, match="no probabilities"):
        out(model)
