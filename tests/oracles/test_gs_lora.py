"""GS-LoRA: its losses against loops, its groups against a numerical minimiser, and what a step leaves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.attach import Adapters
from gossamer.core.errors import BudgetError, TargetError, UnknownName
from gossamer.methods.finetuning.gs_lora import apart, forgetting_loss, group_norms, prototypes

SOFT = lambda row: [math.exp(v) / sum(math.exp(u) for u in row) for v in row]


def two_blocks() -> nn.Sequential:
    torch.manual_seed(0)
    block = lambda: nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)})
    model = nn.Sequential(block(), block())
    for m in model:
        m.forward = lambda x, m=m: x + m["down"](m["up"](x).relu())
    return model


def adapted(**options: object) -> tuple[nn.Module, Adapters, torch.optim.Optimizer]:
    model = two_blocks()
    adapters = gossamer.adapt(model, "gs_lora", targets=["*.up", "*.down"], **{"rank": 2, "strength": 3.0, **options})
    return model, adapters, torch.optim.SGD(adapters.parameters(), lr=0.1)


def test_losses_against_loops():
    torch.manual_seed(0)
    kept, gone, y, z = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([2, 2])
    ce = lambda logits, labels: sum(-math.log(SOFT(r)[int(k)]) for r, k in zip(logits.tolist(), labels)) / len(labels)
    for bound in (5.0, 0.1):
        expected = ce(kept, y) + 0.3 * max(bound - ce(gone, z), 0.0)
        assert forgetting_loss(kept, y, gone, z, bound=bound).item() == pytest.approx(expected, rel=1e-5)
    nothing = forgetting_loss(kept, y, gone[:0], z[:0], bound=5.0)
    assert nothing.item() == pytest.approx(ce(kept, y), rel=1e-5)
    assert forgetting_loss(kept[:0], y[:0], gone, z, bound=5.0).item() == pytest.approx(
        0.3 * (5 - ce(gone, z)), rel=1e-5
    )


def test_prototypes_against_loops():
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.tensor([0, 2, 2, 0, 2])
    found = prototypes(x, y, 4)
    for c in (0, 2):
        torch.testing.assert_close(found[c], x[y == c].mean(0))
    assert not found[[1, 3]].any()
    rows = zip(x.tolist(), found[y].tolist())
    kl = sum(p * math.log(p / q) for a, b in rows for q, p in zip(SOFT(a), SOFT(b))) / 5
    assert apart(x, y, found).item() == pytest.approx(kl, rel=1e-4)
    assert apart(found[y], y, found).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("by, sizes", [("block", [4, 4]), ("layer", [2] * 4), ("matrix", [1] * 8)])
def test_one_step_is_gradient_then_prox(by, sizes):
    """Against argmin over each group of ½‖z − x‖² + t·λ·‖z‖, found along the ray to x, where it must lie."""
    model, adapters, optimizer = adapted(by=by, strength=4.0)
    factors = dict(model.named_parameters())
    factors = {n: p for n, p in factors.items() if n.endswith((".A", ".B"))}
    model(torch.randn(3, 6)).square().sum().backward()
    moved = {n: (p - 0.1 * p.grad).detach() for n, p in factors.items()}
    optimizer.step()
    adapters.step(optimizer)
    block, layer = (lambda n: n.split(".")[0]), (lambda n: n.split(".deltas")[0])
    key = {"block": block, "layer": layer, "matrix": lambda n: n}[by]
    groups = {k: [n for n in factors if key(n) == k] for k in {key(n) for n in factors}}
    assert sorted(len(g) for g in groups.values()) == sizes
    for names in groups.values():
        x = torch.cat([moved[n].flatten() for n in names]).double()
        along = torch.linspace(0, 1, 200001, dtype=torch.float64)
        cost = 0.5 * ((1 - along) * x.norm()) ** 2 + 0.1 * 4.0 * along * x.norm()
        z = torch.cat([factors[n].detach().flatten() for n in names]).double()
        torch.testing.assert_close(z, x * along[cost.argmin()], atol=2e-5, rtol=0)


def test_idle_groups_go_to_exactly_zero_stay_there_and_change_nothing():
    model, adapters, optimizer = adapted()
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.1)
    x = torch.randn(3, 6)
    before = model(x).detach()
    for _ in range(12):
        optimizer.zero_grad()
        (0.0 * model(x)).sum().backward()
        optimizer.step()
        adapters.step(optimizer)
    assert set(group_norms(adapters).values()) == {0.0} and len(group_norms(adapters)) == 2
    assert not any(p.any() for p in adapters.parameters())
    assert torch.equal(model(x), before) and not optimizer.state


def test_a_group_that_the_loss_needs_survives():
    model, adapters, _ = adapted(strength=1.0)
    optimizer = torch.optim.Adam(adapters.parameters(), lr=0.03)
    x = torch.randn(64, 6)
    goal = two_blocks()
    goal[1]["down"].weight.data += 0.5
    want = goal(x).detach()
    first = functional.mse_loss(model(x), want).item()
    for _ in range(150):
        optimizer.zero_grad()
        functional.mse_loss(model(x), want).backward()
        optimizer.step()
        adapters.step(optimizer)
    norms = group_norms(adapters)
    assert norms["0"] == 0.0 < norms["1"]
    assert functional.mse_loss(model(x), want).item() < 0.3 * first


def test_bad_input():
    with pytest.raises(BudgetError, match="strength is a number of at least 0, got -1"):
        gossamer.adapt(two_blocks(), "gs_lora", targets=["*.up"], strength=-1)
    with pytest.raises(UnknownName, match="way to group"):
        gossamer.adapt(two_blocks(), "gs_lora", targets=["*.up"], by="blok")
    _, adapters, _ = adapted()
    with pytest.raises(TargetError, match=r"call step\(optimizer\)"):
        adapters.step()
    with pytest.raises(TargetError, match="does not train these adapters"):
        adapters.step(torch.optim.SGD([torch.zeros(1)], lr=0.1))
