"""LoCA's transform and its gradients, against dense transforms, loops, and values that the official code printed."""

from __future__ import annotations

import pytest
import torch
from scipy import fft
from torch import nn

import gossamer
from gossamer.attach import Adapters, load_adapter
from gossamer.core.errors import BudgetError, TargetError
from gossamer.methods.finetuning.loca import cosines, synthesis


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def somewhere(outputs: int, inputs: int, count: int) -> torch.Tensor:
    ends = torch.tensor([[outputs - 1.0], [inputs - 1.0]], dtype=torch.float64)
    return torch.rand(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * ends


def spectrum(a: torch.Tensor, places: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    s = torch.zeros(outputs, inputs, dtype=a.dtype)
    for value, row, column in zip(a, *places.round().long()):
        s[row, column] = s[row, column] + value
    return s


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_the_matrix_is_the_orthonormal_transform(size):
    c = cosines(size, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(c @ c.t(), torch.eye(size, dtype=c.dtype))
    torch.testing.assert_close(c, torch.tensor(fft.dct(torch.eye(size).double().numpy(), norm="ortho", axis=0)))


@pytest.mark.parametrize("outputs, inputs, count", [(7, 5, 9), (1, 6, 3), (6, 1, 3), (8, 8, 200), (4, 3, 0)])
def test_values_against_the_dense_inverse_transform(outputs, inputs, count):
    a, places = numbers(count), somewhere(outputs, inputs, count)
    dense = fft.idctn(spectrum(a, places, outputs, inputs).numpy(), norm="ortho")
    torch.testing.assert_close(synthesis(a, places, outputs, inputs), torch.tensor(dense))


def test_gradients_of_coefficients_are_those_of_the_dense_transform():
    a, places, grad = numbers(9).requires_grad_(), somewhere(7, 5, 9), numbers(7, 5, seed=4)
    (ours,) = torch.autograd.grad(synthesis(a, places, 7, 5), a, grad)
    c, d = (cosines(n, torch.float64, torch.device("cpu")) for n in (7, 5))
    (dense,) = torch.autograd.grad(c.t() @ spectrum(a, places, 7, 5) @ d, a, grad)
    torch.testing.assert_close(ours, dense)
    assert torch.autograd.gradcheck(lambda a: synthesis(a, places, 7, 5), a)


def test_gradients_of_places_are_half_of_what_moving_changes():
    """Away from edges, on a linear loss: (loss with the coefficient one further − loss with it one before) / 2."""
    outputs, inputs, grad = 7, 6, 0.1 * numbers(7, 6, seed=5)
    a, places = numbers(4), torch.tensor([[1.0, 3.0, 5.0, 2.0], [4.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    places.requires_grad_()
    (ours,) = torch.autograd.grad(synthesis(a, places, outputs, inputs), places, grad)
    for axis in (0, 1):
        for n in range(4):
            step = torch.zeros_like(places)
            step[axis, n] = 1
            loss = [(synthesis(a, places + s * step, outputs, inputs) * grad).sum().item() for s in (1, -1)]
            assert ours[axis, n].item() == pytest.approx((loss[0] - loss[1]) / 2)


def test_gradients_of_places_at_edges_and_their_limit():
    a = torch.tensor([1.0, 50.0], dtype=torch.float64)
    places = torch.tensor([[0.0, 3.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    grad = numbers(4, 3, seed=6)
    k = torch.tensor(fft.dctn(grad.numpy(), norm="ortho"))
    (ours,) = torch.autograd.grad(synthesis(a, places, 4, 3), places, grad)
    expected = [
        [(k[1, 2] - k[0, 2]) / 2, 25 * (k[3, 0] - k[2, 0])],
        [(k[0, 2] - k[0, 1]) / 2, 25 * (k[3, 1] - k[3, 0])],
    ]
    raw = torch.tensor(expected, dtype=torch.float64)
    assert raw.abs().max() > 1, "the example must reach the limit"
    torch.testing.assert_close(ours, raw.clamp(-1, 1))


def test_what_the_official_function_printed():
    """IdctWithIndexGrad of layer.py on these numbers, with its transforms in mode "default" (cosines in float32)."""
    n = lambda count: torch.arange(1, count + 1, dtype=torch.float64)
    a = (n(5) * 1.3).sin().requires_grad_()
    places = torch.stack([((n(5) * 0.9).sin() + 1) / 2 * 3, ((n(5) * 1.7).cos() + 1) / 2 * 4]).requires_grad_()
    w = synthesis(a, places, 4, 5)
    w.backward((n(20) * 0.7).cos().view(4, 5))
    row = [0.01985679, 0.55356231, -0.46753933, 0.05990016, 0.14613776]
    torch.testing.assert_close(w[0].detach(), torch.tensor(row, dtype=w.dtype), atol=1e-6, rtol=0)
    by_a = [1.16110566, -1.96715303, -0.02558052, 0.04327316, 0.48657832]
    torch.testing.assert_close(a.grad, torch.tensor(by_a, dtype=w.dtype), atol=1e-6, rtol=0)
    by_places = [
        [0.68105715, -0.61730785, 0.00815716, 0.00637243, -0.00135089],
        [-0.69511893, 0.86970180, -0.07723210, -0.02443828, -0.03538863],
    ]
    torch.testing.assert_close(places.grad, torch.tensor(by_places, dtype=w.dtype), atol=1e-6, rtol=0)


def test_nothing_is_computed_for_what_does_not_learn():
    a, places = numbers(3).requires_grad_(), somewhere(4, 4, 3)
    assert torch.autograd.grad(synthesis(a, places, 4, 4).sum(), a)[0].shape == (3,)
    places.requires_grad_()
    assert torch.autograd.grad(synthesis(a.detach(), places, 4, 4).sum(), places)[0].shape == (2, 3)


def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def adapted(**options: object) -> tuple[nn.Module, Adapters]:
    model = tiny()
    chosen = {"coefficients": 7, "scale": 0.5, "moving": 60, **options}
    return model, gossamer.adapt(model, "loca", targets=["0", "2"], **chosen)


def train(model: nn.Module, adapters: Adapters, steps: int, rate: float = 0.05) -> None:
    """SGD, so that what does not learn does not move."""
    optimizer = torch.optim.SGD(adapters.parameters(), lr=rate)
    x, y = numbers(16, 6, seed=2), numbers(16, 5, seed=3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        adapters.step()


def test_nothing_changes_before_the_first_step():
    model, adapters = adapted()
    x = numbers(4, 6)
    torch.testing.assert_close(model(x), tiny()(x), atol=0, rtol=0)
    assert adapters.trainable == 2 * 3 * 7


def test_the_layer_computes_with_the_dense_inverse_transform():
    model, adapters = adapted(coefficients=9)
    train(model, adapters, 5)
    for at, plain in (("0", tiny()[0]), ("2", tiny()[2])):
        delta = adapters.deltas("default")[at]
        rows, columns = plain.weight.shape
        ends = torch.tensor([[rows - 1.0], [columns - 1.0]], dtype=torch.float64)
        places = (delta.places.detach() * 0.02).clamp(0, 0.999) * ends
        dense = fft.idctn(spectrum(delta.coefficients.detach(), places, rows, columns).numpy(), norm="ortho")
        x = numbers(3, columns, seed=8)
        expected = x @ (plain.weight + 0.5 * torch.tensor(dense)).t() + plain.bias
        torch.testing.assert_close(model[int(at)](x), expected.detach())


def test_ten_steps_train_coefficients_twenty_train_places_and_then_places_rest():
    model, adapters = adapted(moving=45)
    delta = adapters.deltas("default")["0"]
    moved = []
    for _ in range(75):
        was = delta.coefficients.detach().clone(), delta.places.detach().clone()
        train(model, adapters, 1, rate=0.5)
        moved.append((not torch.equal(was[0], delta.coefficients), not torch.equal(was[1], delta.places)))
    turns = ["a" if a and not b else "l" if b and not a else "?" for a, b in moved]
    assert "".join(turns) == "a" * 10 + "l" * 20 + "a" * 10 + "l" * 5 + "a" * 30


def test_merging_fusing_and_files(tmp_path):
    model, adapters = adapted()
    train(model, adapters, 12)
    x, plain = numbers(4, 6), tiny()
    side_by_side = model(x).detach()
    adapters.merge()
    torch.testing.assert_close(model(x), side_by_side)
    adapters.unmerge()
    torch.testing.assert_close(model[0].weight.data, plain[0].weight.data, atol=0, rtol=0)
    adapters.save(tmp_path / "one")
    other = tiny()
    loaded = load_adapter(other, tmp_path / "one")
    torch.testing.assert_close(other(x), side_by_side, atol=0, rtol=0)
    assert loaded.deltas()["0.default"].learning == "places"
    adapters.fuse("twice", {"default": 2.0})
    was = {at: d.change(plain[int(at)].weight) for at, d in adapters.deltas("default").items()}
    for at, d in adapters.deltas("twice").items():
        torch.testing.assert_close(d.change(plain[int(at)].weight), 2 * was[at])


def test_a_run_resumed_from_its_state_goes_on_as_it_would_have():
    model, adapters = adapted()
    train(model, adapters, 17)
    other, again = adapted(seed=4)
    other.load_state_dict(model.state_dict())
    train(model, adapters, 30), train(other, again, 30)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), atol=0, rtol=0)


def test_half_precision_weights_keep_wide_coefficients():
    model = tiny().bfloat16()
    adapters = gossamer.adapt(model, "loca", targets=["0"], coefficients=3)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    assert model(torch.ones(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_input():
    with pytest.raises(BudgetError, match="at least one coefficient"):
        adapted(coefficients=0)
    with pytest.raises(BudgetError, match="'0' has 48 entries, fewer than 49 coefficients"):
        adapted(coefficients=49)
    with pytest.raises(BudgetError, match="from 0 to the run's 100, got 101"):
        adapted(total_steps=100, moving=101)
    with pytest.raises(TargetError, match="has a weight of shape"):
        gossamer.adapt(nn.Sequential(nn.Conv2d(1, 2, 3)), "loca", targets=["0"], coefficients=2)
    assert adapted(total_steps=200, moving=None)[1].deltas("default")["0"].moving == 20
