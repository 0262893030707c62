"""Sparse-IFT: FLOPs to the last multiplication, layers against formulas written out, all families trained by RigL."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.attach.meter import Meter
from gossamer.attach.targets import find
from gossamer.core.errors import BudgetError, TargetError, UnknownName
from gossamer.recipes.sparse_ift import sparse_ift

FAMILIES = ("wide", "parallel", "factorized", "doped")


class Net(nn.Module):
    """Strides, a residual sum, norms, a depthwise and a dilated convolution, a flattened reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.norm1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8, affine=False)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.two = nn.Conv2d(8, 12, 3, stride=2, padding=1, padding_mode="reflect")
        self.hidden, self.out = nn.Linear(12 * 16, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.depth(self.norm1(self.one(x)))).relu()
        x = functional.relu(self.two(x)).flatten(1)
        return self.out(self.hidden(x).relu())


def network() -> Net:
    torch.manual_seed(0)
    return Net().train()


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def forward_flops(model: nn.Module, handle=None) -> int:
    """2·weights·positions over all linear and convolution layers, the kept ones where a handle holds them."""
    held = {r.name: r.kept for r in handle.report()} if handle else {}
    spent = []

    def count(name):
        def hook(module, args, output):
            positions = output.numel() // module.weight.shape[0]
            spent.append(2 * positions * held.get(name, module.weight.numel()))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    hooks = [m.register_forward_hook(count(n)) for n, m in layers]
    model(X)
    for hook in hooks:
        hook.remove()
    return sum(spent)


def trained(model: nn.Module, done, steps: int = 0, method: str = "static"):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    more = {"total_steps": 20, "every": 4} if method == "rigl" else {}
    where = {"targets": done.densities, "allocation": done.densities}
    handle = gossamer.attach(model, method, optimizer=optimizer, **where, **more)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        handle.step()
        losses.append(loss.item())
    return handle, losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
def test_flops_are_those_of_the_dense_network(family, density):
    dense, model = network(), network()
    done = sparse_ift(model, family, X, density=density)
    handle, _ = trained(model, done)
    assert forward_flops(model, handle) == forward_flops(dense)
    assert {layer.name for layer in done.layers} | {n for n, _ in done.skipped} == {
        n for n, m in dense.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    }
    for layer in done.layers:
        assert layer.kept == layer.dense == dense.get_submodule(layer.name).weight.numel()
    wide = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert family == "doped" or wide > sum(p.numel() for p in dense.parameters() if p.ndim > 1) / density / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_rigl_trains_them_at_the_flops_of_the_report(family):
    model = network()
    done = sparse_ift(model, family, X, density=0.25, skip=["stem", "out"])
    handle, losses = trained(model, done, steps=20, method="rigl")
    assert losses[-1] < losses[0] / 2 and handle.report().sad > 0
    dense = network()
    layers = [t for t in find(dense, ("*",)).targets if t.name in {layer.name for layer in done.layers}]
    meter = Meter(dense, layers)
    dense(X)
    free = sum(2 * layer.fixed * meter.positions[layer.name] for layer in done.layers)
    want = sum(2 * layer.dense * meter.positions[layer.name] for layer in done.layers)
    assert handle.report().flops.forward + 20 * free == 20 * want


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_each_family_is_its_formula(kind, bias):
    torch.manual_seed(1)
    layer = nn.Linear(12, 10, bias=bias) if kind == "linear" else nn.Conv2d(12, 10, 3, 2, 1, bias=bias)
    x = torch.randn(4, 12) if kind == "linear" else torch.randn(4, 12, 7, 7)
    product = functional.linear if kind == "linear" else lambda x, w, b=None: functional.conv2d(x, w, b, 2, 1)
    back = functional.linear if kind == "linear" else lambda x, w, b=None: functional.conv2d(x, w, b)
    normed = (
        functional.layer_norm if kind == "linear" else lambda x, _: functional.batch_norm(x, None, None, training=True)
    )
    n, per = layer.weight.numel(), layer.weight.numel() // 10 + 10

    net = nn.Sequential(copy.deepcopy(layer))
    sparse_ift(net, "parallel", density=0.25)
    parts = [net[0][j][0].weight for j in range(4)]
    assert len(net[0]) == 4 and all(w.shape == layer.weight.shape for w in parts)
    torch.testing.assert_close(net(x), sum(normed(product(x, w), (10,)) for w in parts))

    net = nn.Sequential(copy.deepcopy(layer))
    sparse_ift(net, "factorized", density=0.25)
    u, v = net[0][0].weight, net[0][3].weight
    rank = math.ceil(4 * n / per)  # the official code: ⌈9ab/((1−s)(9a+b))⌉
    assert u.shape[0] == v.shape[1] == rank and (net[0][3].bias is not None) == bias
    torch.testing.assert_close(net(x), back(normed(product(x, u), (rank,)).relu(), v, net[0][3].bias))

    net = nn.Sequential(copy.deepcopy(layer))
    done = sparse_ift(net, "doped", density=0.25)
    w, u, v = net[0][0].weight, net[0][1][0].weight, net[0][1][1].weight
    assert u.shape[0] == math.floor(0.75 * n / per) and w.shape == layer.weight.shape  # ⌊s·9ab/(9a+b)⌋
    assert done.densities == {"0.0": (n - u.numel() - v.numel()) / n} and done.densities["0.0"] >= 0.25
    torch.testing.assert_close(net(x), product(x, w, net[0][0].bias) + back(product(x, u), v))


def test_wide_widens_by_the_root_and_keeps_what_layers_are():
    model = network().double().eval()
    sparse_ift(model, "wide", X.double(), density=0.25)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert shapes == {
        "stem": (16, 3, 3, 3),
        "one": (16, 16, 3, 3),
        "depth": (16, 1, 3, 3),
        "two": (24, 16, 3, 3),
        "hidden": (40, 24 * 16),
        "out": (5, 40),
    }
    assert model.norm.num_features == 16 and model.norm1.weight is None and model.depth.groups == 16
    assert model.one.dilation == (2, 2) and model.two.padding_mode == "reflect" and model.stem.bias is None
    assert not any(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64} and model(X.double()).shape == (6, 5)


def test_layers_left_out_keep_their_widths():
    model = network()
    done = sparse_ift(model, "wide", X, density=0.25, skip=["out"])
    assert model.out.weight.shape == (5, 20) and model.hidden.weight.shape == (20, 24 * 16)
    assert done.densities["hidden"] == 0.5 and done.densities["one"] == 0.25 and "out" not in done.densities
    model = network()
    done = sparse_ift(model, "doped", density=0.5, targets=["one", "depth"])
    assert list(done.densities) == ["one.0"] and dict(done.skipped)["depth"].startswith("is a grouped convolution")
    assert isinstance(model.depth, nn.Conv2d)


def test_norms_may_be_given_and_new_layers_are_where_the_old_ones_were():
    model = network().double()
    sparse_ift(model, "factorized", density=0.5, norm=lambda outputs: nn.Identity(), targets=["hidden"])
    assert isinstance(model.hidden[1], nn.Identity) and model(X.double()).dtype == torch.float64


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.floats(0.02, 0.66), st.sampled_from(FAMILIES)
)
def test_counts_add_up_whatever_the_shape(inputs, outputs, kernel, density, family):
    layer = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv1d(outputs, 3, 1))
    dense = [m.weight.numel() for m in (model[0], model[2])]
    try:
        done = sparse_ift(model, family, torch.ones(1, inputs, 4), density=density)
    except TargetError as error:
        assert family == "doped" and "room for no low-rank part" in str(error)
        return
    for entry in done.layers:
        assert entry.kept == entry.dense and all(0 <= kept <= size for kept, size in entry.parts.values())
        assert entry.dense in dense
    weights = dict(model.named_parameters())
    assert all(weights[f"{n}.weight"].numel() == p[1] for e in done.layers for n, p in e.parts.items())
    assert model(torch.ones(2, inputs, 4)).shape == (2, 3, 4)


def test_what_cannot_be_replaced_is_refused_in_words():
    with pytest.raises(UnknownName, match="did you mean 'wide'"):
        sparse_ift(network(), "wider", X)
    for density in (0.0, 1.0):
        with pytest.raises(BudgetError, match="above 0 and below 1"):
            sparse_ift(network(), "wide", X, density=density)
    with pytest.raises(BudgetError, match="second branch"):
        sparse_ift(network(), "parallel", density=0.8)
    with pytest.raises(TargetError, match="pass an example"):
        sparse_ift(network(), "wide")
    with pytest.raises(TargetError, match="is to stay as it is"):
        sparse_ift(network(), "wide", X, targets=["depth"])
    with pytest.raises(TargetError, match="whole model"):
        sparse_ift(nn.Linear(3, 3), "doped", density=0.1)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(TargetError, match="shares its weight"):
        sparse_ift(tied, "parallel")
    model = network()
    handle = gossamer.attach(model, "static", density=0.5)
    with pytest.raises(TargetError, match=r"call handle\.remove"):
        sparse_ift(model, "parallel")
    handle.remove()


def test_recurrent_layers_are_left_as_they_are():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.say = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 10)

        def forward(self, x):
            return self.say(self.read(x)[0])

    model = Tagger()
    done = sparse_ift(model, "doped", density=0.5)
    assert list(done.densities) == ["say.0"] and model(torch.ones(2, 3, 6)).shape == (2, 3, 10)
    assert dict(done.skipped) == dict.fromkeys(("read.weight_ih_l0", "read.weight_hh_l0"), "is a LSTM")
    with pytest.raises(TargetError, match="can be made wider"):
        sparse_ift(Tagger(), "wide", torch.ones(2, 3, 6))
