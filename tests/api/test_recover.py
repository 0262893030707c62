"""recover: the pruned model comes nearer to the dense one, its zeros stay, and it is left as it was found."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.core.errors import CalibrationError, TargetError
from gossamer.recipes.prune import prune
from gossamer.recipes.recover import recover, squarehead

transformers = pytest.importorskip("transformers")


def pair():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    dense = transformers.BertModel(config).eval()
    for p in dense.parameters():  # default weights are so small that layers hardly differ
        p.data.mul_(3.0 if p.ndim > 1 else 1.0)
    model = copy.deepcopy(dense)
    prune(model, "magnitude", density=0.3)
    return dense, model


def batches(n: int = 6) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, 5:] = 0
    return [{"input_ids": torch.randint(50, (4, 9), generator=g), "attention_mask": mask} for _ in range(n)]


def loss(model, dense) -> float:
    held_out = {"input_ids": torch.randint(50, (16, 9), generator=torch.Generator().manual_seed(9))}
    with torch.no_grad():
        got, want = (m(**held_out, output_hidden_states=True).hidden_states[1:] for m in (model, dense))
    return float(squarehead(got, want))


def test_recovery_lowers_the_loss_on_held_out_text_and_keeps_the_zeros() -> None:
    dense, model = pair()
    frozen = model.encoder.layer[0].output.dense.bias.requires_grad_(False)
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.ndim == 2}
    embedding = model.embeddings.word_embeddings.weight.clone()
    frozen_value = frozen.clone()
    dense.train()
    model.encoder.train()
    before = loss(model.eval(), dense.eval())
    model.encoder.train()
    report = recover(model, dense, batches(), steps=60, lr=3e-3)
    assert model.encoder.training
    model.eval()
    assert loss(model, dense) < 0.7 * before
    model.encoder.train()
    assert report.steps == 60 and report.losses[-1] < report.losses[0]
    for n, p in model.named_parameters():
        if n in zeros:
            assert bool((p[zeros[n]] == 0).all())
    assert torch.equal(model.embeddings.word_embeddings.weight, embedding)
    assert set(model.state_dict()) == set(dense.state_dict())  # no masks left behind
    assert torch.equal(frozen, frozen_value) and model.encoder.training and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not frozen.requires_grad and model.embeddings.word_embeddings.weight.requires_grad
    assert model.config._attn_implementation == dense.config._attn_implementation


def test_squarehead_is_its_definition_and_ignores_padding() -> None:
    s, t = [torch.randn(2, 3, 4) for _ in range(2)], [torch.randn(2, 3, 4) for _ in range(2)]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    want = sum(((a - b)[mask] ** 2).sum() / (b[mask] ** 2).sum() for a, b in zip(s, t))
    torch.testing.assert_close(squarehead(s, t, mask), want)


def test_time_limits_hold_and_errors_say_what_is_missing() -> None:
    dense, model = pair()
    report = recover(model, dense, batches(), steps=100_000, seconds=0.5)
    assert 1 <= report.steps < 100_000
    with pytest.raises(CalibrationError, match="no batches"):
        recover(model, dense, [], steps=1)
    with pytest.raises(TargetError, match="no support to hold"):
        recover(copy.deepcopy(dense), dense, batches(), steps=1)
