"""Lottery tickets and soups against loops written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.attach import hold
from gossamer.core import Support
from gossamer.core.errors import BudgetError, CalibrationError, TargetError, UnknownName
from gossamer.recipes.batch_norm import reestimate_batch_norms
from gossamer.recipes.cycles import shrinking
from gossamer.recipes.lottery_ticket import lottery_ticket
from gossamer.recipes.soup import sparse_soup

STEPS = 12


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(10)] if norm else []
    return nn.Sequential(nn.Linear(6, 10), *middle, nn.ReLU(), nn.Linear(10, 4))


def batch(step: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(16, 6, generator=rng)
    return x, x[:, :4].argmax(1)


def train(model: nn.Module, handle, member: int = 0) -> int:
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    first = handle.steps
    for step in range(first, STEPS):
        x, y = batch(step, member)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        handle.step()
    return first


def by_hand(model: nn.Module, masks: dict[str, torch.Tensor], first: int, member: int = 0) -> None:
    """The same training with masks multiplied in after every step and into every gradient."""
    cut = lambda: [m.weight.data.mul_(masks[n]) for n, m in model.named_modules() if n in masks]
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    cut()
    for step in range(first, STEPS):
        x, y = batch(step, member)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for n, m in model.named_modules():
            if n in masks:
                m.weight.grad.mul_(masks[n])
        optimizer.step()
        cut()


def largest(model: nn.Module, masks: dict[str, torch.Tensor] | None, density: float) -> dict[str, torch.Tensor]:
    """The largest of all weights together, inside the masks."""
    layers = {n: m.weight.data for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    flat = torch.cat(
        [(w.abs() if masks is None else torch.where(masks[n], w.abs(), -1.0)).flatten() for n, w in layers.items()]
    )
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: round(density * flat.numel())]] = True
    parts = chosen.split([w.numel() for w in layers.values()])
    return {n: p.view_as(w) for (n, w), p in zip(layers.items(), parts)}


@pytest.mark.parametrize("rewind_to", [0, 3])
def test_a_ticket_is_what_the_loop_by_hand_finds(rewind_to):
    model, twin = network(), network()
    ticket = lottery_ticket(model, train, density=0.5, per_round=0.3, rewind_to=rewind_to)
    start = {k: v.clone() for k, v in twin.state_dict().items()} if rewind_to == 0 else None
    optimizer = torch.optim.SGD(twin.parameters(), 0.3, momentum=0.5)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
        if step + 1 == rewind_to:
            start = {k: v.clone() for k, v in twin.state_dict().items()}
    masks = None
    for density in (0.7, 0.5):
        masks = largest(twin, masks, density)
        twin.load_state_dict(start)
        by_hand(twin, masks, rewind_to)
    assert all(torch.equal(ticket.supports[n].kept, m) for n, m in masks.items())
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    assert [c.density for c in ticket.cycles] == pytest.approx([1.0, 0.7, 0.5])
    assert [c.result for c in ticket.cycles] == [0, rewind_to, rewind_to]


def test_a_ticket_trains_again_to_the_same_weights_and_elsewhere_to_others():
    model = network()
    ticket = lottery_ticket(model, train, density=0.4, rewind_to=2)
    found = copy.deepcopy(model.state_dict())
    ticket.train(model, train)
    assert all(torch.equal(v, found[k]) for k, v in model.state_dict().items())
    torch.manual_seed(9)
    other = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).state_dict()
    ticket.train(model, train, state=other)
    assert not torch.equal(model[0].weight, found["0.weight"])
    for name, support in ticket.supports.items():
        assert (model.get_submodule(name).weight[~support.kept] == 0).all()


def test_densities_fall_by_the_share_down_to_the_last():
    assert shrinking(0.512, 0.2) == (0.8, 0.64, 0.512)
    assert shrinking(0.9, 0.2) == (0.9,)
    for density in (0.0, 1.0, -1.0):
        with pytest.raises(BudgetError):
            shrinking(density, 0.2)


def test_a_run_too_short_to_rewind_is_refused():
    with pytest.raises(BudgetError, match=r"took 12 steps.*step 50"):
        lottery_ticket(network(), train, density=0.5, rewind_to=50)


def test_a_training_that_never_steps_is_refused():
    model = network()
    with pytest.raises(TargetError, match=r"handle.step\(\)"):
        lottery_ticket(model, lambda model, handle: None, density=0.5)
    assert not hasattr(model[0], "parametrizations")


def averaged(model: nn.Module, states: list[dict], inside: tuple[int, ...]) -> nn.Module:
    model.load_state_dict({k: torch.stack([states[i][k] for i in inside]).mean(0) for k in states[0]})
    return model


def picked(model: nn.Module, states: list[dict], value) -> tuple[int, ...]:
    """The greedy loop: from the best down, a member stays where the soup is worth no less with it than without."""
    alone = [value(averaged(model, states, (i,))) for i in range(len(states))]
    inside: tuple[int, ...] = ()
    for i in sorted(range(len(states)), key=lambda i: -alone[i]):
        if not inside or value(averaged(model, states, (*inside, i))) >= value(averaged(model, states, inside)):
            inside = (*inside, i)
    return inside


VALUES = {
    "loss": lambda m: -functional.cross_entropy(m(batch(99)[0]), batch(99)[1]).item(),
    "one sum": lambda m: m[0].weight.double().sum().item(),  # linear: no average beats its best member
    "all alike": lambda m: 1.0,  # no member makes it worse
}


@pytest.mark.parametrize("average, worth", [("uniform", "loss"), *(("greedy", name) for name in VALUES)])
def test_a_soup_is_what_the_loop_by_hand_cooks(average, worth):
    model, value = network(), VALUES[worth]
    train(model, type("Dense", (), {"steps": 0, "step": lambda self: None})())
    twin = copy.deepcopy(model)
    soup = sparse_soup(model, train, density=0.36, phases=2, members=3, average=average, evaluate=value)
    masks = None
    for number, density in enumerate((0.6, 0.36)):
        masks = largest(twin, masks, density)
        start, states = copy.deepcopy(twin.state_dict()), []
        for member in range(3):
            twin.load_state_dict(start)
            by_hand(twin, masks, 0, member)
            states.append(copy.deepcopy(twin.state_dict()))
        inside = (0, 1, 2) if average == "uniform" else picked(twin, states, value)
        assert soup.phases[number].chosen == inside
        assert worth != "one sum" or len(inside) == 1
        assert worth != "all alike" or inside == (0, 1, 2)
        averaged(twin, states, inside)
        assert soup.phases[number].values[-1] == pytest.approx(value(twin), abs=1e-5)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))
    kept = sum(s.count for s in soup.supports.values())
    assert kept == round(0.36 * 100) and sum(int((m.weight != 0).sum()) for m in (model[0], model[2])) == kept


@pytest.mark.parametrize("method", ["magnitud", "rigl", "snip", "wanda", "sparsegpt", "topkast", "bdwp"])
def test_what_loops_cannot_do_is_refused_before_anything_is_trained(method):
    never = lambda *_: pytest.fail("it was trained")
    error = UnknownName if method == "magnitud" else TargetError
    with pytest.raises(error, match="magnitude"):
        lottery_ticket(network(), never, density=0.5, method=method)
    with pytest.raises(error, match="magnitude"):
        sparse_soup(network(), never, density=0.5, method=method)
    with pytest.raises(BudgetError, match="from 0 on, got -1"):
        lottery_ticket(network(), never, density=0.5, rewind_to=-1)


def test_a_soup_takes_new_statistics_for_its_batch_norms():
    model = network(norm=True)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
    sparse_soup(model, train, density=0.5, phases=1, members=2, recalibrate=[x])
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))


def test_unknown_averages_and_missing_values_are_refused():
    with pytest.raises(BudgetError, match="uniform"):
        sparse_soup(network(), train, density=0.5, average="median")
    with pytest.raises(BudgetError, match="evaluate="):
        sparse_soup(network(), train, density=0.5, average="greedy")


def test_batch_norms_average_batches_and_keep_their_ways():
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=0.2), nn.Dropout(0.5)).train()
    parts = torch.randn(4, 32, 6, generator=torch.Generator().manual_seed(5))
    reestimate_batch_norms(model, [{"input": p} for p in parts])
    y = model[0](parts)
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 1)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model[1].running_var, y.var(1).mean(0))
    assert model[1].momentum == 0.2 and model.training and model[2].training
    with pytest.raises(CalibrationError):
        reestimate_batch_norms(model, [])
    plain = nn.Linear(6, 3)
    assert reestimate_batch_norms(plain, (pytest.fail("it was run") for _ in range(1))) is plain


def test_supports_of_another_shape_or_layer_are_refused():
    everything = lambda shape: Support(torch.ones(shape, dtype=torch.bool))
    with pytest.raises(TargetError, match="matches none"):
        hold(network(), supports={"7": everything((10, 6))})
    with pytest.raises(TargetError, match="layout"):
        hold(network(), supports={"0": everything((6, 10))})
