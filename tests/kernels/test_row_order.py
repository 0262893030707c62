"""Rows stored in an order of their own: panel products and convolutions write each row where it belongs."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

import gossamer
from gossamer.core.errors import FormatError
from gossamer.deploy.structure import detect
from gossamer.formats import RowGrouped
from gossamer.kernels.cpu import spmm_panels as product
from gossamer.kernels.cpu.conv import refuse_conv, sparse_conv
from gossamer.kernels.cpu.spmm import spmm, spmm_columns
from gossamer.kernels.cpu.spmm_panels import spmm_panels
from gossamer.kernels.cpu.window import Window
from gossamer.kernels.lowering import lower
from gossamer.kernels.reference import ACTIVATIONS
from gossamer.runtime.weights import Weights
from tests.kernels.test_cpu_panels import cut_into, guarded, untouched, within
from tests.kernels.test_cpu_spmm import threads  # noqa: F401

FORM = "rowgrouped(g=4), re-ordered"


def scattered(rows, cols, g, density=0.3):
    """A weight of rows in groups with one support each, whose rows are mixed; and the order that sorts them."""
    torch.manual_seed(rows + cols + g)
    kept = (torch.rand(-(-rows // g), cols) < density).repeat_interleave(g, 0)[:rows]
    order = torch.randperm(rows)
    w = torch.empty(rows, cols)
    w[order] = torch.randn(rows, cols) * kept
    return w, order


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("residual", [None, "apart", "in place"])
@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize(("rows", "g"), [(7, 1), (13, 2), (37, 4), (40, 8), (45, 8), (3, 4)])
def test_panels_in_order(rows, g, blocks, residual, activation, threads, monkeypatch):  # noqa: F811
    monkeypatch.setattr(product, "GRAIN", 1)
    w, order = scattered(rows, 50, g)
    stream = lower(RowGrouped.from_dense(w, g=g, order=order))
    x, _ = guarded(2, 50, 112)
    y, sides = guarded(2, rows, 112)
    x[..., :100], bias, added = torch.randn(2, 50, 100), torch.randn(rows), None
    if residual:
        added, _ = guarded(2, rows, 112) if residual == "apart" else (y, None)
        added[..., :100] = torch.randn(2, rows, 100)
    before = None if added is None else added[..., :100].clone()
    with cut_into(blocks):
        spmm_panels(stream, x, bias, activation, added, y, used=100)
    assert within(y[..., :100], w, x[..., :100], bias, before, activation) and untouched(sides)


@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rows", "g", "groups"), [(6, 1, 1), (13, 2, 1), (22, 4, 1), (19, 8, 1), (16, 4, 2)])
def test_convolutions_in_order(rows, g, groups, residual, activation, threads):  # noqa: F811
    each = 6 // groups * 9
    w, order = scattered(rows, each, g)
    if groups > 1:
        order = torch.cat([torch.randperm(rows // groups) + first for first in range(0, rows, rows // groups)])
    stream = lower(RowGrouped.from_dense(w, g=g, order=order))
    x, bias, window = torch.randn(2, 6, 11, 19), torch.randn(rows), Window((3, 3), (2, 1), (1, 1, 1, 1))
    want = conv2d(x, w.view(rows, -1, 3, 3), bias, (2, 1), 1, groups=groups)
    added = torch.randn_like(want) if residual else None
    got = sparse_conv(stream, x, window, bias, activation, groups=groups, residual=added)
    want = ACTIVATIONS[activation](want if added is None else want + added)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_an_order_that_mixes_groups_of_a_convolution_is_refused():
    w, _ = scattered(16, 27, 4)
    mixed = lower(RowGrouped.from_dense(w, g=4, order=torch.arange(16).view(4, 4).t().flatten()))
    assert "different groups" in refuse_conv(mixed, Window((3, 3)), 2) and refuse_conv(mixed, Window((3, 3)), 1) is None


def test_products_that_keep_the_stored_order_refuse_another_one():
    w, order = scattered(12, 20, 4)
    stream, x = lower(RowGrouped.from_dense(w, g=4, order=order)), torch.randn(9, 20)
    for run, given in ((spmm, x), (spmm_columns, x.t().contiguous())):
        with pytest.raises(FormatError, match="another order"):
            run(stream, given)
    torch.testing.assert_close(spmm(replace(stream, order_M=None), x), (x @ w.t())[:, order])


def test_a_compiled_network_may_take_scattered_groups(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 24, 1), nn.Flatten(2), nn.Linear(63, 40)
    )
    net.eval()
    for i in (0, 2, 4):
        flat = net[i].weight.detach().flatten(1)
        mixed, order = scattered(*flat.shape, 4)
        flat.copy_(mixed)
        assert any(s.reordered for s in detect(flat))
        assert Weights(flat, str(i)).form(FORM).stream.order_M is not None
        assert {FORM, "rowgrouped(g=4)"} & Weights(mixed[order], "sorted")._makers.keys() == {"rowgrouped(g=4)"}
    monkeypatch.setattr(Weights, "fastest", lambda self, *measured: self.form(FORM))
    x = torch.randn(2, 8, 7, 9)
    with torch.no_grad():
        fast = gossamer.compile(net, x)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        assert fast.explain(x).count(FORM) == 3
