"""A callback's checkpoints: they load into the bare model for evaluation, and resume only the run they belong to."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from gossamer.core.errors import TargetError
from gossamer.integrations.late import Late

SPARSE = {"density": 0.25, "every": 2}
RUNS = {
    "rigl": SPARSE,
    "sparse": {**SPARSE, "backend": "sparse"},
    "topkast": SPARSE,
    "sr_ste": {"pattern": "2:4"},
    "bdwp": {"pattern": "2:4"},
    "decaying_mask": {"pattern": "2:4"},
}
HELD = pytest.mark.parametrize("name", RUNS)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def late(name: str) -> Late:
    return Late("rigl" if name == "sparse" else name, RUNS[name])


def train(model, opt, handle, steps: int = 3) -> None:
    for step in range(steps):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        opt.step()
        handle.step()


def kept(model: nn.Module, handle) -> dict[str, torch.Tensor]:
    """The weights that the run would leave if it ended here."""
    weights = {n: model.get_submodule(n).weight.detach() for n in ("0", "2")}
    return {n: torch.where(handle.supports()[n].kept, w, 0) for n, w in weights.items()}


def saved(name: str):
    """A run three steps on: its model, its Late, and what its checkpoint holds."""
    model, callback = net(), late(name)
    callback.expect(model)
    opt = optimizer(model)
    handle = callback.begin(model, opt, 12)
    train(model, opt, handle)
    state = {key: x.clone() for key, x in model.state_dict().items()}
    return model, callback, (state, copy.deepcopy(opt.state_dict()), handle.state_dict()), kept(model, handle)


def same(model: nn.Module, want: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(model.get_submodule(n).weight, w) for n, w in want.items())


@HELD
def test_a_checkpoint_loads_into_the_model_after_the_run(name):
    model, callback, (state, *_), want = saved(name)
    train(model, callback.handle.optimizer, callback.handle)
    callback.end()
    assert set(model.state_dict()) == set(net().state_dict()) and not same(model, want)
    model.load_state_dict(state)
    assert same(model, want) and torch.equal(model[0].bias, state["0.bias"])
    assert (model[0].weight == 0).float().mean() >= 0.5
    assert set(model.state_dict()) == set(net().state_dict())


@HELD
@pytest.mark.parametrize("turn", [1, -1])
def test_a_checkpoint_may_come_in_shards(name, turn):
    _, _, (state, opt_state, handle_state), want = saved(name)
    model, callback = net(), late(name)
    callback.expect(model)
    keys = sorted(state)[::turn]
    for _ in range(2):  # the second time replaces the first
        for shard in (keys[::2], keys[1::2]):
            model.load_state_dict({key: state[key] for key in shard}, strict=False)
        assert same(model, want)
    opt = optimizer(model)
    opt.load_state_dict(copy.deepcopy(opt_state))  # it works on the tensors that it is given
    handle = callback.begin(model, opt, 12, handle_state)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items()) and handle.steps == 3
    slots = opt.state_dict()["state"]
    assert all(torch.equal(x, slots[p][slot]) for p, of in opt_state["state"].items() for slot, x in of.items())


def test_a_shard_that_is_missing_is_told():
    _, _, (state, _, handle_state), _ = saved("rigl")
    model, callback = net(), late("rigl")
    callback.expect(model)
    del state["2.parametrizations.weight.0.mask"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"2\.weight"'):
        model.load_state_dict(state)
    with pytest.raises(TargetError, match="masks did not reach"):
        callback.begin(model, optimizer(model), 12, handle_state)


def test_a_checkpoint_that_was_loaded_before_is_no_part_of_a_fresh_run():
    model, callback, (state, *_), _ = saved("topkast")
    assert state["0.parametrizations.weight.original"].all()
    callback.end()
    model.load_state_dict(state)
    callback.begin(model, optimizer(model), 12)
    held = model[0].parametrizations.weight
    assert not held.original[~held[0].mask].any()  # the run began with what the model computed with, zeros and all


@HELD
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_was_loaded_can_be_copied_and_held_again(name, copied):
    model, callback, (state, _, handle_state), want = saved(name)
    callback.end()
    model.load_state_dict(state)
    twin, another = copied(model), late(name)
    assert same(twin, want)
    late(name).expect(twin)  # a callback of a Trainer that never ran
    another.expect(twin)
    twin.load_state_dict(state)
    another.begin(twin, optimizer(twin), 12, handle_state)
    assert all(torch.equal(x, state[key]) for key, x in twin.state_dict().items())
    assert same(model, want)


@HELD
def test_after_an_interrupted_run_another_begins_with_its_own_optimizer(name):
    model, callback, *_ = saved(name)
    before, fresh = callback.handle, optimizer(model)
    handle = callback.begin(model, fresh, 12)
    assert handle is not before and handle.steps == 0 and handle.optimizer is fresh
    trained = {id(p) for group in fresh.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == trained
    train(model, fresh, handle)


@HELD
def test_masks_that_were_taken_away_by_hand_come_back(name):
    model, callback, (state, _, handle_state), _ = saved(name)
    callback.handle.remove()
    model.load_state_dict(state)
    opt = optimizer(model)
    handle = callback.begin(model, opt, 12, handle_state)
    assert handle.held and all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    train(model, opt, handle)


def test_a_callback_lets_go_of_an_interrupted_run_for_another_model():
    model, callback, _, want = saved("rigl")
    other = net()
    handle = callback.begin(other, optimizer(other), 12)
    assert same(model, want) and set(model.state_dict()) == set(net().state_dict())
    assert handle.model is other and handle.held
