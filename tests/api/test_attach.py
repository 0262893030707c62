"""attach: masks that stay true while training, through checkpoints, and leave cleanly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import gossamer
from gossamer.attach import hold
from gossamer.core import soft
from gossamer.core.errors import NonFiniteError, PatternError, TargetError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(model: nn.Module, handle, opt: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(12, 8, generator=g)
        opt.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        opt.step()
        handle.step()


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_pruned_weights_gradients_and_every_optimizer_slot_stay_zero(make) -> None:
    model = net()
    opt = make(model.parameters(), lr=0.01)
    handle = gossamer.attach(model, "gradual_magnitude", density=0.25, total_steps=14, until=10, every=2, optimizer=opt)
    counts = []
    for _ in range(14):
        train(model, handle, opt, 1)
        counts.append(round(handle.density, 4))
        for layer in (model[0], model[2]):
            off = ~layer.parametrizations.weight[0].mask
            original = layer.parametrizations.weight.original
            assert bool((original[off] == 0).all()) and bool(
                (original.grad[off] == 0).all() or counts[-1] != counts[-2:][0]
            )
            for slot in opt.state[original].values():
                if slot.shape == original.shape:
                    assert bool((slot[off] == 0).all())
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0.25
    assert [r.kept for r in handle.report()] == [32, 16]


def test_resuming_from_state_dicts_is_exact() -> None:
    def start():
        model = net()
        opt = torch.optim.Adam(model.parameters(), lr=0.01)
        return (
            model,
            opt,
            gossamer.attach(model, "gradual_magnitude", density=0.2, total_steps=12, every=3, optimizer=opt),
        )

    model, opt, handle = start()
    train(model, handle, opt, 7, seed=1)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), handle.state_dict()))
    train(model, handle, opt, 9, seed=2)
    again, opt2, handle2 = start()
    for part, state in zip((again, opt2, handle2), saved):
        part.load_state_dict(state)
    train(again, handle2, opt2, 9, seed=2)
    for a, b in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_removing_leaves_a_plain_model_with_its_zeros_and_hold_keeps_them() -> None:
    model = net()
    gossamer.attach(model, "magnitude", density=0.5).remove()
    assert set(model.state_dict()) == set(net().state_dict())
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.ndim == 2}
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    handle = hold(model, optimizer=opt)
    train(model, handle, opt, 5)
    handle.remove()
    for n, p in model.named_parameters():
        if p.ndim == 2:
            assert bool((p[zeros[n]] == 0).all()) and int((p != 0).sum()) == int((~zeros[n]).sum())
    with pytest.raises(TargetError, match="no support to hold"):
        hold(net())


def test_methods_that_need_data_say_where_to_go() -> None:
    with pytest.raises(TargetError, match=r"gossamer\.prune"):
        gossamer.attach(net(), "wanda", density=0.5)


def test_a_compiled_masked_model_trains() -> None:
    model = net()
    handle = gossamer.attach(model, "magnitude", density=0.5)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert handle.density == 0.5


def test_a_refused_attach_leaves_no_mask_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 6))
    with pytest.raises(PatternError):
        gossamer.attach(model, "magnitude", density=0.5, pattern="4-row")
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        gossamer.attach(model, "magnitude", density=0.5)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_layers_of_one_model_may_have_handles_of_their_own_but_only_one_each() -> None:
    model = net()
    first = gossamer.attach(model, "magnitude", density=0.5, targets=["0"])
    second = gossamer.attach(model, "magnitude", density=0.25, targets=["2"])
    assert (first.density, second.density) == (0.5, 0.25)
    with pytest.raises(TargetError, match=r"layer '0' still carries.*handle\.remove"):
        gossamer.attach(model, "magnitude", density=0.5)


def test_what_attach_would_ignore_is_refused() -> None:
    sparsifier = gossamer.get_method("magnitude")(density=0.5)
    with pytest.raises(TargetError, match="density would be ignored"):
        gossamer.attach(net(), sparsifier, density=0.1)
    with pytest.raises(TargetError, match="hard"):
        gossamer.attach(net(), replace(sparsifier, shrink=soft(0.1)))


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 4), nn.Conv1d(2, 3, 2), nn.LSTM(3, 4, 2, proj_size=2), nn.GRUCell(3, 4)]
)
def test_parameters_are_in_their_old_order_once_the_masks_are_gone(layer: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(layer), nn.LayerNorm(3))
    before = [(n, id(p)) for n, p in model.named_parameters()]
    gossamer.attach(model, "magnitude", density=0.5).remove()
    assert [(n, id(p)) for n, p in model.named_parameters()] == before
