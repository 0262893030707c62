"""Sparse spectral training against a naive twin: loops over vectors, gradients by hand, the official update rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer
from gossamer.attach import Adapters, load_adapter
from gossamer.core.errors import BudgetError, TargetError
from gossamer.methods.finetuning.sparse_spectral import composed, drawn


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parts(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, v = torch.linalg.svd(numbers(outputs, inputs), full_matrices=False)
    return u, s, v


@pytest.mark.parametrize("outputs, inputs, moving", [(6, 4, [0, 3]), (4, 6, [2]), (5, 5, [0, 1, 2, 3, 4])])
def test_values_and_gradients_against_a_loop(outputs, inputs, moving):
    u, s, v = parts(outputs, inputs)
    left, right = u[:, moving] + 0.1 * numbers(outputs, len(moving), seed=1), v[moving] * 1.5
    s, left, right = (x.clone().requires_grad_() for x in (s, left, right))
    grad = numbers(outputs, inputs, seed=2)
    w = composed(s, left, right, u, v, torch.tensor(moving))
    expected = torch.zeros(outputs, inputs, dtype=u.dtype)
    for i in range(len(s)):
        a = left[:, moving.index(i)] if i in moving else u[:, i]
        b = right[moving.index(i)] if i in moving else v[i]
        expected = expected + s[i] * torch.outer(a, b)
    torch.testing.assert_close(w, expected)
    ours = torch.autograd.grad(w, (s, left, right), grad)
    true = torch.autograd.grad(expected, (s, left, right), grad)
    torch.testing.assert_close(ours[0], true[0])
    for place, i in enumerate(moving):  # the enhanced gradient is the true one without the factor σ
        torch.testing.assert_close(ours[1][:, place] * s[i], true[1][:, place])
        torch.testing.assert_close(ours[2][place] * s[i], true[2][place])


def test_draws_follow_the_stated_odds():
    s = torch.tensor([6.0, 3.0, 1.0, 0.0])
    draw = torch.Generator().manual_seed(5)
    seen = torch.zeros(4)
    for _ in range(4000):
        seen[drawn(s, 1, draw)] += 1
    torch.testing.assert_close(seen / 4000, (0.25 + s / 10) / 2, atol=0.03, rtol=0)
    assert drawn(s, 4, draw).tolist() == [0, 1, 2, 3] and drawn(torch.zeros(3), 2, draw).shape == (2,)


X, Y = numbers(12, 6, seed=3), numbers(12, 5, seed=4)
RATE = 0.0005


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    model[0].weight.data = numbers(5, 6, seed=7)
    return model


def adapted(rank: int = 2, every: int = 3) -> tuple[nn.Module, Adapters, torch.optim.Optimizer]:
    model = layer()
    adapters = gossamer.adapt(model, "sparse_spectral", targets=["0"], rank=rank, every=every)
    return model, adapters, torch.optim.SGD(adapters.parameters(), lr=RATE, momentum=0.9)


def step(model: nn.Module, adapters: Adapters, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(X) - Y).square().sum().backward()
    optimizer.step()
    adapters.step(optimizer)


def test_a_run_against_a_naive_twin():
    """Twelve steps of SGD with momentum: four draws, one of them with a new decomposition."""
    model, adapters, optimizer = adapted()
    delta = adapters.deltas("default")["0"]
    u, s, v = torch.linalg.svd(layer()[0].weight.detach(), full_matrices=False)
    bias, speed = layer()[0].bias.detach(), {}
    for count in range(1, 13):
        moving = delta.moving.tolist()
        w = sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(5))
        torch.testing.assert_close(delta.weight().detach(), w)
        g = 2 * (X @ w.t() + bias - Y).t() @ X
        pulls = {"s": torch.stack([u[:, i] @ g @ v[i] for i in range(5)])}
        pulls |= {f"u{i}": g @ v[i] for i in moving} | {f"v{i}": u[:, i] @ g for i in moving}
        speed = {k: 0.9 * speed[k] + pull if k in speed else pull for k, pull in pulls.items()}
        s = (s - RATE * speed["s"]).clamp(min=0)
        for i in moving:
            u[:, i] -= RATE * speed[f"u{i}"]
            v[i] -= RATE * speed[f"v{i}"]
            u[:, i] /= u[:, i].norm()
            v[i] /= v[i].norm()
        if count % 3 == 0:
            speed = {"s": speed["s"]}
        if count == 9:
            assert (s > 1e-3).all(), "a null vector could be any"
            u, s, v = torch.linalg.svd(sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(5)), full_matrices=False)
            speed = {}
        step(model, adapters, optimizer)


def test_only_drawn_vectors_move_and_keep_length_one():
    model, adapters, optimizer = adapted()
    delta = adapters.deltas("default")["0"]
    for count in range(1, 9):
        u, v, moving = delta.u.clone(), delta.v.clone(), delta.moving.tolist()
        step(model, adapters, optimizer)
        rest = [i for i in range(5) if i not in moving]
        torch.testing.assert_close(delta.u[:, rest], u[:, rest], atol=0, rtol=0)
        torch.testing.assert_close(delta.v[rest], v[rest], atol=0, rtol=0)
        assert torch.equal(delta.u, u) == bool(count % 3), "what moved is put back when others are drawn"
        torch.testing.assert_close(delta.left.norm(dim=0), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(delta.right.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_a_round_leaves_the_product_and_makes_vectors_orthonormal():
    model, adapters, optimizer = adapted()
    delta = adapters.deltas("default")["0"]
    for _ in range(8):
        step(model, adapters, optimizer)
    eye = torch.eye(5, dtype=torch.float64)
    assert not torch.allclose(delta.u.t() @ delta.u, eye), "by now the vectors must have lost it"
    delta.steps += 1  # the ninth: three draws of two make a round of five vectors
    w = delta.weight().detach()
    assert len(delta.turn()) == 3
    torch.testing.assert_close(delta.weight().detach(), w, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(delta.u.t() @ delta.u, eye)
    torch.testing.assert_close(delta.v @ delta.v.t(), eye)
    assert (delta.sigma.diff() <= 0).all() and (delta.sigma >= 0).all()


def test_nothing_changes_before_the_first_step_and_merging_keeps_the_function():
    model, adapters, optimizer = adapted()
    torch.testing.assert_close(model(X), layer()(X))
    for _ in range(7):
        step(model, adapters, optimizer)
    learnt = model(X).detach()
    adapters.merge()
    torch.testing.assert_close(model(X), learnt)
    adapters.unmerge()
    assert torch.equal(model[0].weight.data, layer()[0].weight.data)


def test_momenta_start_anew_with_the_vectors():
    model, adapters, optimizer = adapted()
    delta = adapters.deltas("default")["0"]
    for count in range(1, 10):
        step(model, adapters, optimizer)
        held = [p in optimizer.state for p in (delta.left, delta.right, delta.sigma)]
        assert held == [count % 3 != 0, count % 3 != 0, count != 9]


def test_a_run_resumed_from_its_files_goes_on_as_it_would_have(tmp_path):
    model, adapters, optimizer = adapted()
    for _ in range(6):
        step(model, adapters, optimizer)
    adapters.save(tmp_path / "half")
    other = layer()
    again = load_adapter(other, tmp_path / "half")
    pair = [
        (model, adapters, torch.optim.SGD(adapters.parameters(), lr=RATE)),
        (other, again, torch.optim.SGD(again.parameters(), lr=RATE)),
    ]
    for _ in range(7):
        for run in pair:
            step(*run)
    assert torch.equal(other(X), model(X))


def test_singular_values_stop_at_zero():
    _, adapters, _ = adapted()
    delta = adapters.deltas("default")["0"]
    delta.sigma.data[3] = -0.5
    with torch.no_grad():
        delta.advance(layer()[0].weight)
    assert delta.sigma[3] == 0 and (delta.sigma[:3] > 0).all()


def test_bad_input():
    with pytest.raises(BudgetError, match="rank goes from 1 to 5 in '0', got 6"):
        adapted(rank=6)
    with pytest.raises(BudgetError, match="at least 1, got 0"):
        adapted(every=0)
    with pytest.raises(TargetError, match="has a weight of shape"):
        gossamer.adapt(nn.Sequential(nn.Conv2d(1, 2, 3)), "sparse_spectral", targets=["0"])
    _, adapters, _ = adapted(every=1)
    with pytest.raises(TargetError, match=r"call step\(optimizer\)"):
        adapters.step()
