"""Rearranged networks compute what they did; and the two mobile methods are what their papers say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.core import get_method
from gossamer.core.errors import BudgetError, PatternError, TargetError
from gossamer.data.vision import EfficientNetLite0, MobileNetV2
from gossamer.methods.weights.fast_sparse_convnets import pointwise
from gossamer.recipes.channels import spaces
from gossamer.recipes.rearrange import rearrange


class Residual(nn.Module):
    """A stem, a depthwise pair with a shortcut and a shared space, flattening, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 1, bias=False)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.back = nn.Conv2d(32, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.out = nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(8 * 4, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = functional.relu6(self.norm(self.stem(x)))
        y = functional.silu(self.deep(self.wide(x)))
        x = x + self.back(y)
        x = self.out(torch.relu(self.grouped(x)))
        x = torch.flatten(functional.adaptive_avg_pool2d(x, 2), 1)
        return self.head(functional.gelu(self.fc(x)))


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases that are not all alike, so that a forgotten permutation shows."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.bias.data, m.running_mean):
                t.normal_(1.0, 0.3)
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


def test_outputs_stay_and_residual_partners_move_together():
    model = stirred(Residual())
    x = torch.randn(2, 3, 10, 10)
    want, before = model(x), {n: p.detach().clone() for n, p in model.named_parameters()}
    done = rearrange(model, x, pattern="(o {4}) [i] {...}", density=0.3)
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    assert done.difference < 1e-5
    assert {("wide",), ("out",), ("fc",)} <= set(done.moved)
    reasons = {names: why for names, why in done.fixed if names}
    assert "grouped" in reasons[("grouped",)] and reasons[("head",)] == "the network's output"
    assert any({"stem", "back"} == set(names) and "grouped" in why for names, why in done.fixed)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"wide.weight", "deep.weight", "deep.bias", "back.weight", "fc.weight", "fc.bias", "head.weight"} <= moved
    assert not {"stem.weight", "norm.weight", "grouped.weight", "head.bias"} & moved


def test_a_shortcut_without_grouped_layers_moves_as_one():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b, self.c = (
                nn.Conv2d(3, 8, 1),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 8, 1),
                nn.Conv2d(8, 4, 1),
            )

        def forward(self, x):
            x = self.norm(self.a(x))
            return self.c(x + self.b(x).relu()).mean((2, 3))

    model, x = stirred(Block()), torch.randn(1, 3, 4, 4)
    want = model(x)
    (space,) = [s for s in spaces(model, x) if not s.fixed]
    assert sorted(space.writers) == ["a", "b"] and sorted(n for n, _ in space.readers) == ["b", "c"]
    assert rearrange(model, x, pattern="2-row", density=0.5).difference < 1e-5
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("network", [MobileNetV2, EfficientNetLite0])
@torch.no_grad()
def test_mobile_networks_stay(network):
    model = stirred(network())
    x = torch.randn(1, 3, 32, 32)
    want = model(x)
    assert set(pointwise(model)) <= {n for s in spaces(model, x) if not s.fixed for n in s.writers}
    done = rearrange(model, x, pattern="320-row", density=0.3)  # few layers fit, which keeps the search short
    assert done.moved and float((model(x) - want).abs().max()) < 1e-4 * float(want.abs().max())


def kept_share(model: nn.Module, density: float) -> float:
    whole = sum(float(m.weight.detach().abs().sum()) for m in model if isinstance(m, nn.Conv2d))
    gossamer.prune(model, "sparsebytenn", density=density, group=4)
    return sum(float(m.weight.detach().abs().sum()) for m in model if isinstance(m, nn.Conv2d)) / whole


def test_rearranging_keeps_more_weight():
    def network() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 1)
        ).eval()

    moved = network()
    rearrange(moved, torch.randn(1, 8, 4, 4), pattern="4-row", density=0.25)
    assert kept_share(moved, 0.25) > 1.03 * kept_share(network(), 0.25)


def test_what_cannot_be_followed_is_refused_or_left_alone():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TargetError, match="cannot be traced"):
        rearrange(Branches(), torch.randn(1, 3))
    with pytest.raises(PatternError, match="ties neighbouring rows"):
        rearrange(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), torch.randn(1, 4), pattern="unstructured")
    with pytest.raises(BudgetError, match="fraction that will be kept"):
        rearrange(nn.Sequential(nn.Linear(4, 8)), torch.randn(1, 4), density=0.0)
    masked = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    gossamer.attach(masked, "magnitude", density=0.5)
    with pytest.raises(TargetError, match=r"handle\.remove"):
        rearrange(masked, torch.randn(1, 4))
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    tied[2].weight = tied[0].weight
    x = torch.randn(3, 8)
    want = tied(x)
    done = rearrange(tied, x, pattern="2-row")
    assert torch.equal(tied(x), want) and done.moved == ()

    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(self.a(self.a(x)).sort(1).values)

    model = Reused()
    want = model(x)
    rearrange(model, x, pattern="2-row")
    assert torch.equal(model(x), want)


def test_layers_with_hooks_and_unlike_ranks_are_left_alone():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.c(self.b(x) + x.mean((2, 3)))  # channels of the one meet columns of the other

    model, x = Odd().eval(), torch.randn(8, 3, 8, 8)
    want = model(x)
    done = rearrange(model, x, pattern="2-row", density=0.5)
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    assert done.moved == ()
    hooked = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    hooked[0].register_forward_pre_hook(lambda module, args: None)
    x = torch.randn(3, 8)
    want = hooked(x)
    assert rearrange(hooked, x, pattern="2-row").moved == () and torch.equal(hooked(x), want)


def test_sparsebytenn_by_hand():
    w = torch.zeros(2, 3, 2, 2)
    w[0, 0], w[1, 0], w[0, 1], w[1, 1], w[0, 2], w[1, 2] = 1.0, 1.0, 3.0, -0.5, 0.0, 1.5
    pruned, support = get_method("sparsebytenn")(density=2 / 3, group=2).apply(w, {})
    assert support.kept[:, :, 0, 0].tolist() == [[True, True, False]] * 2  # sums over pair and kernel: 8, 14, 6
    assert torch.equal(pruned[:, 2], torch.zeros(2, 2, 2))
    depthwise = torch.randn(8, 1, 3, 3)
    assert torch.equal(get_method("sparsebytenn")(density=0.7).apply(depthwise, {})[0], depthwise)
    with pytest.raises(BudgetError, match="filters that share"):
        get_method("sparsebytenn")(group=0)


def test_fast_sparse_convnets_prunes_pointwise_layers_along_the_ramp():
    model = MobileNetV2()
    layers = pointwise(model)
    assert len(layers) == 34 and "features.0.0" not in layers and "classifier.1" not in layers
    late = layers[-2:]
    early = gossamer.attach(model, "fast_sparse_convnets", targets=layers[:2], density=0.2, total_steps=2, every=1)
    groups = gossamer.attach(
        model, "fast_sparse_convnets", targets=late, density=0.2, total_steps=2, every=1, pattern="4-row"
    )
    densities = [early.density]
    for _ in range(2):
        early.step()
        groups.step()
        densities.append(early.density)
    assert densities[0] == 1.0 and abs(densities[1] - 0.3) < 0.01 and abs(densities[2] - 0.2) < 0.01
    kept = groups.supports()[late[0]].kept.flatten(1).view(-1, 4, model.get_submodule(late[0]).weight.shape[1])
    assert (kept == kept[:, :1]).all() and abs(groups.density - 0.2) < 0.01
