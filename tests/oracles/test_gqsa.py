"""GQSA: grids against a naive twin and against the stored format, and training that leaves weights on their grid."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.attach import find
from gossamer.core import get_method
from gossamer.core.errors import BudgetError, CalibrationError, FormatError, PatternError, TargetError
from gossamer.formats import Int4Groups
from gossamer.formats.shared_grid import SharedGrid
from gossamer.nn import PackedLinear
from gossamer.recipes.distillation import logit_kl
from gossamer.recipes.gqsa import gqsa
from gossamer.recipes.prune import prune
from gossamer.recipes.rounding import OnGrid
from gossamer.solve import saliency

transformers = pytest.importorskip("transformers")


def problem(rows: int, columns: int, seed: int, density: float = 0.5):
    """A weight and a support of whole groups of sixteen."""
    g = torch.Generator().manual_seed(seed)
    kept = (torch.rand(rows, columns // 16, generator=g) < density).repeat_interleave(16, 1)
    return torch.randn(rows, columns, generator=g), kept


def neighbour(value: float, up: bool) -> float:
    """The bfloat16 number at or next to a float32 one: its upper sixteen bits, one more where it must be larger."""
    number = torch.tensor(value).bfloat16()
    if (number.float() < value) if up else (number.float() > value):
        number = torch.nextafter(number, torch.tensor(math.inf if up else -math.inf, dtype=torch.bfloat16))
    return float(number)


def naive(w, kept, bits, width):
    """Run by run, weight by weight."""
    out = torch.zeros_like(w)
    for i in range(len(w)):
        columns = kept[i].nonzero().flatten().tolist()
        for start in range(0, len(columns), width):
            run = columns[start : start + width]
            values = w[i, run]
            low = neighbour(float(values.min()), up=False)
            scale = neighbour(float((values.max() - low) / (2**bits - 1)), up=True)
            for j in run:
                code = min(max(round(float((w[i, j] - low) / scale)) if scale else 0, 0), 2**bits - 1)
                out[i, j] = torch.tensor(low) + torch.tensor(scale) * code
    return out


@pytest.mark.parametrize("bits, width", [(4, 128), (2, 64), (8, 5), (1, 3)])
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_a_grid_is_the_naive_one(bits, width, seed, density):
    g = torch.Generator().manual_seed(seed)
    w, kept = torch.randn(3, 150, generator=g), torch.rand(3, 150, generator=g) < density
    got = SharedGrid.of(kept, bits=bits, width=width).rounded(w)
    torch.testing.assert_close(got, naive(w, kept, bits, width), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers(1, 20))
def test_with_four_bits_and_groups_it_is_the_stored_format_and_rounding_twice_changes_nothing(seed, density, groups):
    w, kept = problem(5, 16 * groups, seed, density)
    once = SharedGrid.of(kept).rounded(w)
    assert torch.equal(once, Int4Groups.from_dense(w, kept).to_dense())
    assert torch.equal(SharedGrid.of(kept).rounded(once), once)
    assert torch.equal(Int4Groups.from_dense(once, kept).to_dense(), once)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_trained_scales_are_stored_as_they_are(seed):
    w, kept = problem(6, 320, seed)
    grid = SharedGrid.of(kept)
    values, codes = grid.encode(w)
    moved = (values.float() * (1 + 0.3 * torch.rand(values.shape))).bfloat16()
    new = grid.decode(moved, codes)
    again, same = grid.encode(new)
    assert torch.equal(again, moved) and torch.equal(same[grid.real_Cw], codes[grid.real_Cw])
    assert torch.equal(Int4Groups.from_dense(new, kept).to_dense(), new)


def test_bits_and_refusals_of_a_grid():
    _, kept = problem(4, 256, 0)
    kept = torch.ones_like(kept)
    assert SharedGrid.of(kept).nbits == 4 * 256 * 4 + 32 * 8 and SharedGrid.of(kept).count == 1024
    for options in ({"bits": 0}, {"bits": 9}, {"width": 0}):
        with pytest.raises(FormatError, match="1 to 8 bits"):
            SharedGrid.of(kept, **options)


def test_the_method_keeps_the_groups_that_cost_most_and_stores_to_the_bit():
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(7, 96, generator=g), torch.randn(400, 96, generator=g) * torch.rand(96, generator=g)
    stats = {"gram": x.T @ x / 400}
    new, support = get_method("gqsa")(density=0.5).apply(w, stats)
    worth = saliency(w, stats).view(7, 6, 16).sum(2)
    want = [sorted(row.argsort(descending=True)[:3].tolist()) for row in worth]
    assert [row.nonzero().flatten().tolist() for row in support.kept.view(7, 6, 16).all(2)] == want
    assert support.count == 7 * 48 and torch.equal(Int4Groups.from_dense(new, support.kept).to_dense(), new)
    pairs, chosen = get_method("gqsa")(pattern="2:4").apply(w, stats)
    assert (chosen.kept.view(-1, 4).sum(1) == 2).all() and not pairs[~chosen.kept].any()
    with pytest.raises(BudgetError, match="bits"):
        get_method("gqsa")(bits=9)
    with pytest.raises(PatternError, match="multiple of 16"):
        get_method("gqsa")().apply(torch.randn(2, 20), {"gram": torch.eye(20)})


def test_rounded_weights_learn_straight_through_and_scales_by_the_chain_rule():
    w, kept = problem(5, 64, 3)
    x, out = torch.randn(9, 64), torch.randn(9, 5)
    model = nn.Sequential(nn.Linear(64, 5, bias=False))
    target = find(model, ("0",)).targets[0]
    held = OnGrid(model, target, kept, w, bits=4, width=128)
    (weight,) = held.learn_weights()
    ((model(x) * out).sum()).backward()
    torch.testing.assert_close(weight.grad, (out.T @ x) * kept)
    held.release()
    assert torch.equal(model[0].weight, held.grid.rounded(w))
    (values,) = held.learn_scales()
    ((model(x) * out).sum()).backward()
    low, codes = torch.zeros(len(values)), held.grid.encode(model[0].weight)[1].float()
    by_scale = low.clone()
    for c, (index, real) in enumerate(zip(held.grid.index_Cw, held.grid.real_Cw)):
        gradient = (out.T @ x).flatten()[index] * real
        low[c], by_scale[c] = gradient.sum(), (gradient * codes[c]).sum()
    torch.testing.assert_close(values.grad, torch.stack([low, by_scale], 1), rtol=1e-4, atol=1e-4)


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    sizes["initializer_range"] = 0.15  # or its answers would hardly depend on its layers
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **sizes))


def windows(count=24):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(48, (1, 20), generator=g)} for _ in range(count)]


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


FAST = {"lr": 1e-2, "end_lr": 1e-3, "batch": 4}


def test_trained_weights_pack_to_the_bit_and_answer_alike():
    model, dense = llama(), llama()
    model.train(), model.lm_head.weight.requires_grad_(False)
    report = gqsa(model, windows(), density=0.5, epochs=3, end_epochs=2, **FAST)
    assert report.density == 0.5 and set(report.blocks) == {"model.layers.0", "model.layers.1"}
    assert all(after < 0.9 * before for before, after in report.blocks.values()) and len(report.losses) == 12
    for layer in layers(model).values():
        stored, x = Int4Groups.from_dense(layer.weight.detach()), torch.randn(3, layer.in_features).bfloat16()
        assert torch.equal(stored.to_dense(), layer.weight) and stored.density == 0.5
        exact = x.double() @ layer.weight.double().T
        got = PackedLinear.from_linear(layer, Int4Groups)(x).double()
        assert (got - exact).norm() < 1e-2 * exact.norm()  # the answer is in bfloat16
    assert [p.requires_grad for _, p in model.named_parameters()] == [
        n != "lm_head.weight" for n, _ in model.named_parameters()
    ]
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)


def test_block_by_block_and_end_to_end_come_closer_to_the_dense_model():
    dense, unseen = llama().eval(), torch.cat([w["input_ids"] for w in windows(60)[24:]])

    @torch.no_grad()
    def apart(model):
        return float(logit_kl(model.eval()(unseen).logits, dense(unseen).logits))

    one_shot, blocks, both = (llama() for _ in range(3))
    prune(one_shot, "gqsa", data=windows())
    gqsa(blocks, windows(), epochs=6, end_epochs=0, **FAST)
    gqsa(both, windows(), epochs=6, end_epochs=3, **FAST)
    assert apart(both) < apart(blocks) < 0.8 * apart(one_shot)


def test_the_same_seed_gives_the_same_weights_and_modes_come_back():
    first, second = llama(), llama()
    for model in (first, second):
        model.train()
        gqsa(model, windows(), pattern="2:4", bits=3, width=16, epochs=1, batch=4, seed=5)
        assert model.training and not any(hasattr(m, "parametrizations") for m in model.modules())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers(first).values(), layers(second).values()))
    assert all(((m.weight != 0).view(-1, 4).sum(1) <= 2).all() for m in layers(first).values())


def test_layers_that_store_their_weight_transposed():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    report = gqsa(model, windows(), epochs=2, end_epochs=1, **FAST)
    weight = model.transformer.h[1].mlp.c_fc.weight.detach().t().contiguous()
    stored = Int4Groups.from_dense(weight)
    assert stored.density == 0.5 and torch.equal(stored.to_dense(), weight)
    assert all(after < before for before, after in report.blocks.values())


def test_refusals():
    with pytest.raises(CalibrationError, match="no calibration batch"):
        gqsa(llama(), [])
    with pytest.raises(CalibrationError, match="differ in length"):
        gqsa(llama(), [{"input_ids": torch.ones(1, n, dtype=torch.long)} for n in (4, 5)])
    padded = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    with pytest.raises(CalibrationError, match="padding"):
        gqsa(llama(), [padded])
    with pytest.raises(TargetError, match="call model"):
        gqsa(llama().bfloat16(), windows())
    with pytest.raises(BudgetError, match="rates > 0"):
        gqsa(llama(), windows(), lr=0)
    with pytest.raises(TargetError, match="no list of blocks"):
        gqsa(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)), [{"input": torch.randn(3, 32)}])
