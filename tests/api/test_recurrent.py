"""Recurrent layers behind masks: the forward pass sees the mask and nothing else, however the layer was handled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_sequence

import gossamer
from gossamer.attach.targets import find
from gossamer.core.errors import CalibrationError, TargetError
from gossamer.integrations.brought import Brought

KINDS = {
    "tanh": lambda: nn.RNN(5, 6, 2, batch_first=True),
    "relu": lambda: nn.RNN(5, 6, nonlinearity="relu", batch_first=True),
    "gru": lambda: nn.GRU(5, 6, 2, batch_first=True, bidirectional=True),
    "lstm": lambda: nn.LSTM(5, 6, 2, batch_first=True),
    "two ways": lambda: nn.LSTM(5, 6, batch_first=True, bidirectional=True, bias=False),
    "projected": lambda: nn.LSTM(5, 6, 2, batch_first=True, proj_size=3, bidirectional=True),
}
X = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(3))
PART, MOVES = {"density": 0.25}, {"density": 0.25, "total_steps": 10, "every": 2}
TRAINS = {
    **dict.fromkeys(("static", "global_magnitude", "snip", "synflow", "topkast"), PART),
    **dict.fromkeys(("rigl", "set", "gradual_magnitude"), MOVES),
    "sr_ste": {"pattern": "2:3", "skip": ["rnn.weight_ih_l0"]},
}


class Net(nn.Module):
    """A recurrent layer, dropout (so that the random state matters), and classes for every step."""

    def __init__(self, kind: str = "lstm") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.drop = KINDS[kind](), nn.Dropout(0.1)
        width = self.rnn(X)[0].shape[-1]
        self.out = nn.Linear(width, 4)

    def forward(self, x_NTI: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.rnn(x_NTI)[0]))


def loss(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(out.flatten(0, 1), target.flatten())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(3, 7, 5, generator=g), torch.randint(0, 4, (3, 7), generator=g)


def clean(model: nn.Module, kind: str) -> Net:
    """A plain net with the weights that the held one says it has."""
    twin = Net(kind)
    held = {t.parameter: t.stored(model).detach() for t in find(twin).targets}
    twin.load_state_dict({n: held.get(n, twin.state_dict()[n]) for n in twin.state_dict()})
    with torch.no_grad():
        for name, bias in twin.named_parameters():
            if "bias" in name:
                bias.copy_(model.get_parameter(name))
    return twin


def spoil(handle) -> None:
    """Write into every pruned weight; only the masks stand between them and the outputs."""
    with torch.no_grad():
        for t in handle.targets:
            t.parametrization(handle.model).original.masked_fill_(~handle.supports()[t.name].kept, 1e3)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_a_layer_with_zeros(kind):
    model = Net(kind).eval()
    handle = gossamer.attach(model, "random", density=0.3)
    spoil(handle)
    twin = clean(model, kind).eval()
    torch.testing.assert_close(model(X), twin(X))
    with torch.no_grad():  # torch takes another road where no gradient is wanted
        torch.testing.assert_close(model(X), twin(X))
    target = batch(0)[1]
    for net in (model, twin):
        loss(net(X), target).backward()
    for t in handle.targets:
        kept = handle.supports()[t.name].kept
        gradient = t.parametrization(model).original.grad
        assert not gradient[~kept].any()
        torch.testing.assert_close(gradient, t.stored(twin).grad.masked_fill(~kept, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_matrix_is_a_target_with_an_exact_count(kind):
    model = Net(kind)
    names = [n for n, p in model.named_parameters() if p.ndim == 2]
    allocation = {n.removesuffix(".weight"): d for n, d in zip(names, torch.linspace(0.1, 0.9, len(names)).tolist())}
    handle = gossamer.attach(model, "static", density=0.5, allocation=allocation)
    assert [t.parameter for t in handle.targets] == names and "rnn.weight_hh_l0" in allocation
    for row in handle.report():
        assert row.kept == round(allocation[row.name] * row.size)
        assert row.kept == int(handle.supports()[row.name].kept.sum())


def test_a_held_layer_is_copied_moved_loaded_and_let_go():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    handle = gossamer.attach(model, "static", density=0.3, optimizer=optimizer)
    train(model, optimizer, handle, range(3))
    parameters = {id(p) for p in model.parameters()}
    model.eval()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    with torch.no_grad():
        model.rnn.parametrizations["weight_hh_l0"].original.mul_(2)
    assert not torch.equal(twin(X), model(X))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))
    assert torch.allclose(twin.double()(X.double()), model(X).double(), atol=1e-5)
    spoil(handle)
    before = model(X)
    assert handle.held and handle.remove() is model and not handle.held
    assert type(model.rnn) is nn.LSTM and {id(p) for p in model.parameters()} == parameters
    assert torch.equal(model(X), before) and torch.equal(copy.deepcopy(model)(X), before)
    assert (model.rnn.weight_hh_l0 == 0).float().mean() > 0.5


def test_taking_one_mask_away_leaves_the_others_and_torchs_own_removal_works():
    model = Net().eval()
    gossamer.attach(model, "static", density=0.3, targets=["rnn.weight_hh_l0"])
    second = gossamer.attach(model, "static", density=0.3, targets=["*weight_ih*"])
    before = model(X)
    second.remove()
    assert parametrize.is_parametrized(model.rnn, "weight_hh_l0") and torch.equal(model(X), before)
    parametrize.remove_parametrizations(model.rnn, "weight_hh_l0")
    assert torch.equal(model(X), before)
    model.rnn.weight_hh_l0.data.mul_(2)
    assert not torch.equal(model(X), before)


def test_names_of_layers_and_of_weights():
    names = lambda *include, **how: [t.name for t in find(Net(), include, **how).targets]
    assert names("rnn") == names("rnn.*") == [f"rnn.weight_{w}_l{i}" for i in (0, 1) for w in ("ih", "hh")]
    assert names("re:_hh_") == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    assert names(exclude=["rnn"]) == ["out"]
    alone = nn.GRU(5, 6)
    handle = gossamer.attach(alone, "static", density=0.5)
    assert [t.name for t in handle.targets] == ["weight_ih_l0", "weight_hh_l0"] and handle.targets[0].layer == ""
    with pytest.raises(TargetError, match=r"near|rnn\.weight_hh_l1"):
        names("rnn.weight_hh_l3")


def test_work_is_counted_per_time_step_also_of_packed_sequences_and_cells():
    model = Net("projected")
    handle = gossamer.attach(model, "static", density=0.25, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    loss(model(X), batch(0)[1]).backward()
    handle.optimizer.step()
    handle.step()
    size, kept = sum(r.size for r in handle.report()), sum(r.kept for r in handle.report())
    flops = handle.report().flops
    assert (flops.dense, flops.forward, flops.backward) == (6 * 21 * size, 2 * 21 * kept, 4 * 21 * kept)
    for layer, given, positions in (
        (nn.GRU(5, 6), pack_sequence([X[0], X[1, :2]]), 9),
        (nn.LSTMCell(5, 6), X[0], 7),
        (nn.GRUCell(5, 6), X[0], 7),
    ):
        handle = gossamer.attach(layer, "static", density=0.5)
        handle.observe(given)
        assert set(handle.state_dict()["positions"].values()) == {positions}


def test_layers_that_share_a_weight_share_its_mask():
    model = nn.Sequential(nn.RNNCell(6, 6), nn.RNNCell(6, 6))
    model[1].weight_hh = model[0].weight_hh
    handle = gossamer.attach(model, "static", density=0.5)
    assert [t.name for t in handle.targets] == ["0.weight_ih", "0.weight_hh", "1.weight_ih"]
    assert torch.equal(model[0].weight_hh, model[1].weight_hh) and (model[1].weight_hh == 0).sum() == 18
    handle.remove()
    assert model[0].weight_hh is model[1].weight_hh


def train(model, optimizer, handle, steps) -> None:
    for step in steps:
        x, target = batch(step)
        optimizer.zero_grad()
        loss(model.train()(x), target).backward()
        optimizer.step()
        handle.step()


def begin(method: str):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    shown = {"data": batch(0), "loss": loss}
    return model, optimizer, gossamer.attach(model, method, optimizer=optimizer, **shown, **TRAINS[method])


@pytest.mark.parametrize("method", TRAINS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method):
    torch.manual_seed(1)
    whole = begin(method)
    train(*whole, range(5))
    state = copy.deepcopy([part.state_dict() for part in whole] + [torch.get_rng_state()])
    train(*whole, range(5, 10))
    torch.manual_seed(99)
    again = begin(method)
    for part, held in zip(again, state):
        part.load_state_dict(held)
    torch.set_rng_state(state[-1])
    train(*again, range(5, 10))
    assert whole[2].report() == again[2].report()
    for (name, a), (_, b) in zip(whole[0].state_dict().items(), again[0].state_dict().items()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_moving_supports_keep_counts_and_empty_slots(method):
    model, optimizer, handle = begin(method)
    counts, first = [r.kept for r in handle.report()], handle.supports()["rnn.weight_hh_l0"].kept.clone()
    for step in range(6):
        train(model, optimizer, handle, range(step, step + 1))
        assert [r.kept for r in handle.report()] == counts
        for t in handle.targets:
            kept, w = handle.supports()[t.name].kept, t.parametrization(model).original
            assert not w[~kept].any() and not optimizer.state[w]["momentum_buffer"][~kept].any()
    assert not torch.equal(first, handle.supports()["rnn.weight_hh_l0"].kept)


def test_checkpoints_of_a_held_net_load_into_the_bare_one_and_back():
    held = Net().eval()
    handle = gossamer.attach(held, "static", density=0.2)
    spoil(handle)
    bare = Net().eval()
    brought = Brought.to(bare)
    bare.load_state_dict(held.state_dict())
    assert brought.complete and torch.equal(bare(X), held(X)) and type(bare.rnn) is nn.LSTM
    again = gossamer.attach(bare, "static", density=0.2)
    bare.load_state_dict(brought.state(), strict=False)
    assert torch.equal(bare(X), held(X)) and again.report().density == handle.report().density


@pytest.mark.parametrize("method", ["magnitude", "global_magnitude", "snip"])
def test_prune_reaches_recurrent_weights(method):
    model = Net()
    report = gossamer.prune(model, method, density=0.25, data=[batch(0)], loss=loss)
    assert report.layers[1].name == "rnn.weight_hh_l0" and report.density == pytest.approx(0.25, abs=2e-3)
    assert sum(int((t.weight(model) != 0).sum()) for t in find(model).targets) == sum(r.kept for r in report.layers)
    copy.deepcopy(model)


def test_what_recurrent_layers_cannot_be_is_refused_in_words():
    model = Net()
    skipped = dict(gossamer.prune(Net(), "wanda", density=0.5, data=[X]).skipped)
    assert "hidden states" in skipped["rnn.weight_hh_l0"]
    with pytest.raises(TargetError, match="use method 'magnitude'"):
        gossamer.prune(model, "wanda", density=0.5, data=[X], targets=["rnn"])
    with pytest.raises(CalibrationError, match="hidden states"):
        gossamer.prune(model, "magnitude", density=0.5, data=[X], allocation="sensitivity")
    with pytest.raises(TargetError, match=r"'rnn\.weight_ih_l0' is a LSTM"):
        gossamer.attach(model, "static", density=0.5, backend="sparse", optimizer="later")
    with pytest.raises(TargetError, match="LSTM, whose backward pass cannot be changed"):
        gossamer.attach(model, "bdwp", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    gossamer.attach(model, "static", density=0.5, targets=["rnn.weight_hh*"])
    with pytest.raises(TargetError, match=r"'rnn\.weight_hh_l0' still carries a mask"):
        gossamer.attach(model, "static", density=0.5)
