"""What calibration must withstand: padding, few tokens, dead inputs, foreign token ids, layers nothing reaches."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.core.errors import CalibrationError, NonFiniteError, UnknownName

transformers = pytest.importorskip("transformers")

SIZE = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **SIZE))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def padded(filler: int, side: str) -> list[dict[str, Tensor]]:
    """Two batches of texts of 40 and 25 tokens, filled up with `filler`."""
    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        ids, mask = torch.randint(32, (2, 40), generator=g), torch.ones(2, 40, dtype=torch.long)
        gap = slice(25, None) if side == "right" else slice(0, 15)
        ids[1, gap], mask[1, gap] = filler, 0
        found.append({"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("method", "sequential"), [("sparsegpt", "layer"), ("wanda", "block"), ("dsnot", "block")])
def test_what_stands_in_the_padding_makes_no_difference(side: str, method: str, sequential: str) -> None:
    models = llama(), llama(), llama()
    for model, filler, masked in zip(models, (3, 17, 17), (True, True, False), strict=True):
        data = padded(filler, side)
        data = data if masked else [{"input_ids": b["input_ids"]} for b in data]
        gossamer.prune(model, method, density=0.5, data=data, sequential=sequential)
    assert same(models[0], models[1])
    assert not same(models[1], models[2])  # unmasked, the same tokens do make one


def test_fewer_tokens_than_inputs_are_pruned_and_said() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
    report = gossamer.prune(model, "sparsegpt", density=0.5, data=[torch.randn(40, 64)])
    first, second = report.layers
    assert "40 calibration tokens for 64 inputs" in first.note and second.note == ""
    assert report.density == 0.5 and bool(model(torch.randn(3, 64)).isfinite().all())


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_singular_hessians_and_dead_inputs_give_finite_weights(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(24, 16))
    x = torch.randn(50, 1) * torch.ones(24)  # rank one
    x[:, :5] = 0
    before = model[0].weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        gossamer.prune(model, method, density=0.5, data=[x])
    w = model[0].weight
    assert bool(w.isfinite().all()) and int((w != 0).sum()) <= w.numel() // 2
    y, want = x @ w.T, x @ before.T
    assert (y - want).norm() < 0.2 * want.norm()  # one direction is easily made up for


def test_a_hessian_that_is_not_finite_names_its_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(NonFiniteError, match=r"layer '0'.*gram"):
        gossamer.prune(model, "sparsegpt", density=0.5, data=[torch.full((4, 8), 1e30)])


def test_token_ids_beyond_the_vocabulary_are_named() -> None:
    model = llama()
    before = llama()
    good, bad = torch.randint(32, (2, 8)), torch.tensor([[1, 2, 40]])
    with pytest.raises(CalibrationError, match=r"batch 1 .*from 1 to 40.*has 32 entries.*tokenizer"):
        gossamer.prune(model, "wanda", density=0.5, data=[{"input_ids": good}, {"input_ids": bad}])
    with pytest.raises(CalibrationError, match="from -1 to 5"):
        gossamer.prune(model, "wanda", density=0.5, data=[{"input_ids": torch.tensor([[-1, 5]])}])
    assert same(model, before)


class Routed(nn.Module):
    """Three experts, of which the second is never asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.experts[which](x)


def test_experts_nothing_reaches_stay_dense_or_are_scored_by_their_weights_and_the_report_says_so(tmp_path) -> None:
    data = [(torch.randn(9, 16), 0), (torch.randn(9, 16), 2)]
    kept, scored, plain = Routed(), Routed(), Routed()
    report = gossamer.prune(kept, "sparsegpt", density=0.25, data=data)
    assert dict(report.skipped)["experts.1"].endswith("left dense")
    assert torch.equal(kept.experts[1].weight, plain.experts[1].weight)
    how = dict(density=0.25, data=data, unreached="magnitude", workdir=tmp_path)
    report = gossamer.prune(scored, "sparsegpt", **how)
    line = next(r for r in report.layers if r.name == "experts.1")
    assert "scored by the weights' magnitude" in line.note and line.density == 0.25 and report.skipped == ()
    gossamer.prune(plain, "magnitude", density=0.25)
    assert torch.equal(scored.experts[1].weight, plain.experts[1].weight)
    again = Routed()
    assert all(r.resumed for r in gossamer.prune(again, "sparsegpt", **how).layers) and same(again, scored)
    with pytest.raises(UnknownName, match="'dense' or 'magnitude'"):
        gossamer.prune(Routed(), "sparsegpt", data=data, unreached="weights")
