"""SaRA against the rule of its official optimizer (`adamw2`): whole AdamW steps, undone outside the mask."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import BudgetError
from tests.oracles.adapters import batch, blocks, train

THETA = 0.08


def official(model: nn.Module, names: list[str], *, steps: int, progressive: int) -> dict[str, torch.Tensor]:
    """What `adamw2` leaves of the named weights: after `progressive` steps the mask is met with what is still small."""
    weights = [model.get_parameter(n) for n in names]
    masks = [w.detach().abs() < THETA for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=0.05, weight_decay=0.0)
    for step in range(1, steps + 1):
        if step == progressive + 1:
            masks = [m & (w.detach().abs() < THETA) for m, w in zip(masks, weights)]
        before = [w.detach().clone() for w in weights]
        optimizer.zero_grad()
        (model(batch(model)) - 1).square().mean().backward()
        optimizer.step()
        for w, m, old in zip(weights, masks, before):
            w.data = torch.where(m, w.data, old)
    return {n: w.detach() for n, w in zip(names, weights)}


@pytest.mark.parametrize("progressive", [2, 100])
def test_the_steps_of_the_official_optimizer(progressive):
    model = blocks(torch.float64)
    adapters = gossamer.adapt(model, "sara", threshold=THETA, again=progressive)
    train(model, adapters.parameters(), steps=6, after=adapters.step)
    held = [int((~d.learns).sum()) for d in adapters.deltas().values()]
    assert bool(sum(held)) is (progressive == 2)
    adapters.merge()
    names = [f"{n}.weight" for n, _ in adapters.layers()]
    for name, expected in official(blocks(torch.float64), names, steps=6, progressive=progressive).items():
        torch.testing.assert_close(model.get_parameter(name), expected)
        started = blocks(torch.float64).get_parameter(name)
        assert (expected[started.abs() >= THETA] == started[started.abs() >= THETA]).all()


def test_the_nuclear_norm_of_one_layer_and_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(80, 70, bias=False), nn.Linear(70, 80, bias=False)))
    adapters = gossamer.adapt(model, "sara", threshold=0.05, nuclear=0.1)
    deltas = adapters.deltas("default")
    drawn = []
    for _ in range(8):
        adapters.penalty().backward()
        drawn.append(next(n for n, d in deltas.items() if d.values.grad is not None))
        w = model.get_submodule(drawn[-1]).weight.detach().clone().requires_grad_()
        mask = w.detach().abs() < 0.05
        loss = 0.1 * torch.linalg.svdvals(w * mask).sum()
        loss.backward()
        torch.testing.assert_close(deltas[drawn[-1]].values.grad, w.grad[mask], atol=1e-5, rtol=1e-4)
        adapters.step()
        for d in deltas.values():
            d.values.grad = None
    assert set(drawn) == {"0", "1"}


def test_a_share_instead_of_a_threshold():
    model = blocks()
    adapters = gossamer.adapt(model, "sara", density=0.25)
    for at, delta in adapters.deltas("default").items():
        w = model.get_submodule(at).weight.flatten().abs()
        assert len(delta.index) == len(w) // 4 and w[delta.index].max() <= w.sort().values[len(w) // 4 - 1]
        assert delta.threshold == w[delta.index].max()


def test_two_adapters_fuse_where_they_meet():
    model = blocks()
    adapters = gossamer.adapt(model, "sara", threshold=0.05)
    adapters.add("sara", name="b", threshold=0.1)
    for name in ("default", "b"):
        adapters.use(name)
        train(model, adapters.parameters())
    adapters.fuse("both", {"default": 1.0, "b": 2.0})
    adapters.use({"default": 1.0, "b": 2.0})
    expected = model(batch(model))
    adapters.use("both")
    torch.testing.assert_close(model(batch(model)), expected)


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"nuclear": -1.0}, {"density": 1.5}])
def test_bad_options(options):
    with pytest.raises(BudgetError, match="sara"):
        gossamer.adapt(blocks(), "sara", **options)
