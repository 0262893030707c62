"""Norms on token panels against torch in float64, with NaN in padding lanes and around what is written."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from token_panels import poisoned_like, to_panels, to_rows
from torch.nn import functional

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu import norm as module
from gossamer.kernels.cpu.norm import layer_norm, plan_layer_norm, rms_norm

ATOL = 2e-5


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(module, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("features", [1, 3, 8, 33, 384])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 17), (3, 65), (2, 130)])
def test_both_norms_with_and_without_residual_and_parameters(batch, seq, features, threads):
    x, r = 2 * draw(batch, seq, features) + 1, draw(batch, seq, features, seed=1)
    gamma, beta = draw(features, seed=2), draw(features, seed=3)
    for residual in (None, r):
        t = (x if residual is None else x + residual).double()
        there = None if residual is None else to_panels(residual)
        for g, b in ((gamma, beta), (gamma, None), (None, None)):
            scale, shift = (None if p is None else p.double() for p in (g, b))
            got = to_rows(layer_norm(to_panels(x), g, b, 1e-6, residual_PKW=there), batch, seq)
            exact = functional.layer_norm(t, (features,), scale, shift, 1e-6)
            assert float((got - exact).abs().max()) < ATOL
            got = to_rows(rms_norm(to_panels(x), g, 1e-6, residual_PKW=there), batch, seq)
            assert float((got - functional.rms_norm(t, (features,), scale, 1e-6)).abs().max()) < ATOL


def test_a_large_mean_costs_no_more_than_its_own_rounding():
    x = draw(1, 64, 384) + 4096.0
    got = to_rows(layer_norm(to_panels(x), None, None, 1e-5), 1, 64)
    exact = functional.layer_norm(x.double(), (384,), eps=1e-5)
    # One pass of sums of squares would lose everything here: 4096² has no bits left below 1.
    assert float((got - exact).abs().max()) < 2e-3


def test_y_may_be_x_or_the_residual(threads):
    x, r = to_panels(draw(2, 65, 24)), to_panels(draw(2, 65, 24, seed=1))
    exact = to_rows(layer_norm(x, residual_PKW=r), 2, 65)
    into_x, into_r = x.clone(), r.clone()
    layer_norm(into_x, residual_PKW=r, out=into_x)
    layer_norm(x, residual_PKW=into_r, out=into_r)
    assert torch.equal(to_rows(into_x, 2, 65), exact) and torch.equal(to_rows(into_r, 2, 65), exact)


def test_nothing_around_is_written_and_nan_stays_in_its_lane(threads):
    x = to_panels(draw(3, 20, 10))
    y, around = poisoned_like(x)
    layer_norm(x, out=y)
    assert torch.equal(y.isnan(), x.isnan()) and all(side.isnan().all() for side in around)


def test_concurrent_calls_agree(threads):
    x = draw(5, 40, 64)  # five panels of 40 features
    first = layer_norm(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(first, y) for y in pool.map(lambda _: layer_norm(x), range(16)))


def test_nothing_to_do_and_errors():
    assert layer_norm(torch.empty(0, 8, 64)).shape == (0, 8, 64)
    assert layer_norm(torch.empty(2, 0, 64)).shape == (2, 0, 64)
    with pytest.raises(FormatError, match=r"x must be .*\[P, K, 64\]"):
        layer_norm(torch.randn(2, 8, 32))
    with pytest.raises(FormatError, match="gamma must be"):
        layer_norm(torch.randn(2, 8, 64), torch.ones(7))
    with pytest.raises(FormatError, match="residual must be"):
        rms_norm(torch.randn(2, 8, 64), residual_PKW=torch.randn(2, 9, 64))
    with pytest.raises(FormatError, match="eps must be finite"):
        plan_layer_norm(1, 8, float("nan"))
