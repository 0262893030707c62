"""AP against a loop written out by hand and the official code's choice, and dead neurons against counts by hand.

Official choices were printed by prune_by_percentile_lt and prune_by_percentile_ap of github.com/Martin1937/
Activate-While-Pruning (resnet_20.py) on the two layers below with torch 2.13. Its list of weights is extended by the
biases' turn as well, so all count twice; with q·n = 2 it prunes 3.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from gossamer.attach.targets import find
from gossamer.core import Density, Sparsifier, pattern
from gossamer.core.errors import BudgetError, CalibrationError, TargetError, UnknownName
from gossamer.recipes.activating import activating_ticket, learned
from gossamer.recipes.cycles import choose_within
from gossamer.recipes.dead_neurons import DeadNeurons, dead_neurons
from gossamer.recipes.lottery_ticket import lottery_ticket
from gossamer.score import magnitude

STEPS = 12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


def train(model: nn.Module, handle) -> int:
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    first = handle.steps
    for step in range(first, STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        handle.step()
    return first


def flat(model: nn.Sequential) -> torch.Tensor:
    return torch.cat([model[i].weight.detach().flatten() for i in (0, 2)])


def by_hand(model: nn.Sequential, kept: torch.Tensor, first: int) -> None:
    masks = {0: kept[:60].view(10, 6), 2: kept[60:].view(4, 10)}
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    cut = lambda: [model[i].weight.data.mul_(m) for i, m in masks.items()]
    cut()
    for step in range(first, STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for i, m in masks.items():
            model[i].weight.grad.mul_(m)
        optimizer.step()
        cut()


@pytest.mark.parametrize("rewind_to", [0, 3])
@pytest.mark.parametrize("activating", [0.05, 0.3])
def test_a_ticket_is_what_the_loop_by_hand_finds(rewind_to, activating):
    """100 weights: 70 and then 50 are kept; 5 (or all 30) and 4 (or all 20) of those that go are negative."""
    model, twin = network(), network()
    ticket = activating_ticket(model, train, density=0.5, per_round=0.3, activating=activating, rewind_to=rewind_to)
    start, kept = {k: v.clone() for k, v in twin.state_dict().items()}, torch.ones(100, dtype=torch.bool)
    optimizer = torch.optim.SGD(twin.parameters(), 0.3, momentum=0.5)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        if step + 1 == rewind_to:
            start = {k: v.clone() for k, v in twin.state_dict().items()}
    for count, negative in ((70, 5), (50, 4)) if activating == 0.05 else ((70, 30), (50, 20)):
        w, was = flat(twin), torch.cat([start["0.weight"].flatten(), start["2.weight"].flatten()])
        by_size = sorted((i for i in range(100) if kept[i]), key=lambda i: abs(w[i].item()))
        kept[by_size[: int(kept.sum()) - count - negative]] = False
        asleep = sorted((i for i in range(100) if kept[i] and w[i] < 0), key=lambda i: abs((w[i] - was[i]).item()))
        kept[asleep[:negative]] = False
        assert int(kept.sum()) == count
        twin.load_state_dict(start)
        by_hand(twin, kept, rewind_to)
    assert torch.equal(torch.cat([ticket.supports[n].kept.flatten() for n in ("0", "2")]), kept)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    assert [c.density for c in ticket.cycles] == pytest.approx([1.0, 0.7, 0.5])


def test_without_ap_it_is_the_lottery_ticket():
    one, other = network(), network()
    a = activating_ticket(one, train, density=0.4, activating=0.0)
    b = lottery_ticket(other, train, density=0.4)
    assert all(torch.equal(a.supports[n].kept, b.supports[n].kept) for n in b.supports)
    assert torch.equal(flat(one), flat(other))


def test_the_choice_is_that_of_the_official_code():
    model = network()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    lots = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=lots)
    found = find(model, ("*",)).targets
    rule = lambda score, d: Sparsifier(score, pattern("unstructured"), Density(d), scope="model")
    first = choose_within(model, found, rule(magnitude, 0.82))
    cut = [s.kept.logical_not().nonzero().tolist() for s in first.values()]
    assert cut[0] == [[0, 1], [0, 5], [2, 4], [3, 0], [4, 1], [6, 3], [6, 4], [7, 0]]
    assert cut[1] == [[0, 0], [0, 3], [0, 5], [0, 7], [0, 9], [1, 9], [2, 3], [2, 7], [2, 9], [3, 9]]
    stats = {n: {"start": start[f"{n}.weight"]} for n in ("0", "2")}
    second = choose_within(model, found, rule(learned, 0.79), first, stats)
    gone = {n: (first[n].kept & ~second[n].kept).nonzero().tolist() for n in first}
    assert gone == {"0": [[4, 4], [7, 1], [8, 0]], "2": []}


@given(seed=st.integers(0, 10**6), count=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_negative_weights_go_first_and_the_least_learned_of_them(seed, count):
    lots = torch.Generator().manual_seed(seed)
    w, start = torch.randn(5, 6, generator=lots), torch.randn(5, 6, generator=lots)
    worth, change = learned(w, {"start": start}).flatten(), (w - start).abs().flatten()
    gone = worth.argsort()[:count]
    negative = w.flatten() < 0
    assert negative[gone].sum() == min(count, int(negative.sum()))
    if count < negative.sum():
        stays = negative.index_fill(0, gone, False)
        assert change[gone].max() <= change[stays].min()


@pytest.mark.parametrize("activating", [-0.01, 0.21, float("nan")])
def test_ap_takes_a_part_of_the_cut(activating):
    with pytest.raises(BudgetError, match="part of each round's cut"):
        activating_ticket(network(), lambda *_: pytest.fail("it was trained"), density=0.5, activating=activating)


def test_other_bad_input_is_refused_before_anything_is_trained():
    never = lambda *_: pytest.fail("it was trained")
    for method, error in (("magnitud", UnknownName), ("rigl", TargetError)):
        with pytest.raises(error, match="magnitude"):
            activating_ticket(network(), never, density=0.5, method=method)
    with pytest.raises(BudgetError, match="between 0 and 1"):
        activating_ticket(network(), never, density=1.0)


def test_dead_neurons_are_those_counted_by_hand():
    model = network()
    x = torch.cat([batch(step)[0] for step in range(3)])
    model[0].weight.data[3] = 0
    model[0].bias.data[3] = -1
    zeros = (model[0](x) <= 0).float()
    always = zeros.min(0).values
    found = dead_neurons(model, x.split(20))
    assert found.static == pytest.approx(always.mean().item()) and found.static >= 0.1
    assert found.dynamic == pytest.approx((zeros.mean(0) * (1 - always)).mean().item())
    assert found.rate == pytest.approx(zeros.mean().item())


class Functional(nn.Module):
    """ReLUs as functions, methods and in place, one of them twice; dropout that has to rest."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out, self.drop = nn.Conv2d(1, 2, 3), nn.Linear(8, 3), nn.Dropout(0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.drop(self.conv(x)))
        return self.out(y.flatten(1)).relu_()


def test_relus_are_found_wherever_they_run_and_modes_come_back():
    model = Functional().train()
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = dead_neurons(model, [{"x": x[:4]}, (x[4:],)])
    assert model.training and model.drop.training
    model.eval()
    with torch.no_grad():
        first = model.conv(x).relu()
        zeros = torch.cat([(first == 0).flatten(1), model(x) == 0], 1).float()
    assert found.rate == pytest.approx(zeros.mean().item())
    assert found.static == pytest.approx((zeros.mean(0) == 1).float().mean().item())


def test_what_has_no_dead_neurons_to_count_is_refused():
    with pytest.raises(CalibrationError, match="no ReLU ran"):
        dead_neurons(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(CalibrationError, match="no ReLU ran"):
        dead_neurons(network(), [])
    with pytest.raises(CalibrationError, match="same size"):
        dead_neurons(nn.ReLU(), [torch.zeros(1, 2), torch.zeros(1, 3)])
    assert dead_neurons(nn.ReLU(), [torch.tensor([[1.0, -1.0]])]) == DeadNeurons(0.5, 0.0)
