"""N:M training against a naive twin (sorted groups, its own backward pass and momentum SGD), and official values.

Official values were printed by the classes of github.com/NM-sparsity/NM-sparsity (devkit/sparse_ops/sparse_ops.py) and
of abhibambhaniya/progressive_gradient_flow_nm_sparsity (timm/sparse_pruning/sparse_functions.py, the one line that is
indented by seven spaces set right), run on the weights below with torch 2.13.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.core import Support, get_method, select
from gossamer.core.errors import BudgetError, PatternError

STEPS, LR, MOMENTUM, DECAY = 20, 0.1, 0.9, 0.01
SHAPES = {"0": (8, 4, 3, 3), "2": (8, 8, 2, 2), "5": (8, 32)}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 2, stride=2), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 8)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(6, 4, 4, 4, generator=g, dtype=torch.float64)
    return x, (x.flatten(1)[:, :8] * 2).sin()


def keep(w: torch.Tensor, n: int, m: int, axis: int) -> torch.Tensor:
    """n largest |w| of each m neighbours along an axis, group by group."""
    lines = np.moveaxis(w.numpy(), axis, -1)
    kept = np.zeros(lines.shape, bool)
    for place in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], m):
            order = np.argsort(-np.abs(lines[place][start : start + m]), kind="stable")[:n]
            kept[place][start + order] = True
    return torch.from_numpy(np.moveaxis(kept, -1, axis).copy())


class Twin:
    """One of the methods, from its paper: `kept(t)` of m, off it fade(t)·w, pulled by `pull`, `back` where two-way."""

    def __init__(self, kept, m: int, fade=lambda t: 0.0, pull: float = 0.0, back: bool = False) -> None:
        self.kept, self.m, self.fade, self.pull, self.back = kept, m, fade, pull, back
        model = net()
        self.w = {n: model[int(n)].weight.detach().clone() for n in SHAPES}
        self.b = {n: model[int(n)].bias.detach().clone() for n in SHAPES}
        self.v = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.vb = {n: torch.zeros_like(b) for n, b in self.b.items()}

    def masks(self, t: int) -> dict[str, torch.Tensor]:
        return {n: keep(w, self.kept(t), self.m, 1) for n, w in self.w.items()}

    def step(self, t: int) -> None:
        """The step after which t steps have been taken."""
        masks = self.masks(t - 1)
        seen = {n: w * (masks[n] + ~masks[n] * self.fade(t - 1)) for n, w in self.w.items()}
        back = {n: w * keep(w, self.kept(t - 1), self.m, 0) for n, w in self.w.items()} if self.back else seen
        x, y = batch(t)
        h = functional.conv2d(x, seen["0"], self.b["0"], padding=1).tanh()
        k = functional.conv2d(h, seen["2"], self.b["2"], stride=2).tanh()
        out = k.flatten(1) @ seen["5"].t() + self.b["5"]
        d_out = 2 * (out - y) / out.numel()
        d_k = (d_out @ back["5"]).view_as(k) * (1 - k * k)
        d_h = functional.conv_transpose2d(d_k, back["2"], stride=2) * (1 - h * h)
        patches = {
            "0": (functional.unfold(x, 3, padding=1), d_h.flatten(2)),
            "2": (functional.unfold(h, 2, stride=2), d_k.flatten(2)),
        }
        dense = {n: torch.einsum("bop,bip->oi", d, p).view(SHAPES[n]) for n, (p, d) in patches.items()}
        dense["5"] = d_out.t() @ k.flatten(1)
        bias = {"0": d_h.sum((0, 2, 3)), "2": d_k.sum((0, 2, 3)), "5": d_out.sum(0)}
        for n, w in self.w.items():
            gradient = dense[n] + self.pull * (w * ~masks[n])
            self.v[n] = MOMENTUM * self.v[n] + gradient + DECAY * w
            self.w[n] = w - LR * self.v[n]
            self.vb[n] = MOMENTUM * self.vb[n] + bias[n] + DECAY * self.b[n]
            self.b[n] = self.b[n] - LR * self.vb[n]


def faded(t: int) -> float:
    return 0.0 if t >= 15 else 0.01 ** (max(t - 2, 0) / 13)


def halved(t: int) -> int:
    return 4 if t < 2 else 3 if t < 8 else 2 if t < 14 else 1


CASES = [
    ("sr_ste", {"pattern": "2:4"}, Twin(lambda t: 2, 4, pull=2e-4)),
    ("sr_ste", {"pattern": "1:4", "pull": 0.05}, Twin(lambda t: 1, 4, pull=0.05)),
    ("decaying_mask", {"pattern": "1:4", "begin": 2}, Twin(lambda t: 1, 4, fade=faded)),
    ("decaying_mask", {"shape": "linear", "until": 10}, Twin(lambda t: 2, 4, fade=lambda t: max(0.0, 1 - t / 10))),
    ("decaying_structure", {"pattern": "1:4", "begin": 2, "until": 20}, Twin(halved, 4)),
    ("bdwp", {"pattern": "1:4"}, Twin(lambda t: 1, 4, back=True)),
    ("bdwp", {"pattern": "2:4", "pull": 0.05}, Twin(lambda t: 2, 4, pull=0.05, back=True)),
]


@pytest.mark.parametrize("method, options, twin", CASES)
def test_twenty_steps(method, options, twin):
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    handle = gossamer.attach(model, method, optimizer=opt, total_steps=STEPS, **options)
    sad = 0
    for t in range(1, STEPS + 1):
        before = twin.masks(t - 1)
        x, y = batch(t)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        handle.step()
        twin.step(t)
        masks = twin.masks(t)
        sad += sum(int((masks[n] ^ before[n]).sum()) for n in SHAPES)
        for n in SHAPES:
            assert torch.equal(handle.supports()[n].kept, masks[n]), (t, n)
            got = model[int(n)].weight.detach()
            want = twin.w[n] * (masks[n] + ~masks[n] * twin.fade(t))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert handle.report().sad == sad > 0
    weights = [m.weight for m in handle.remove() if hasattr(m, "weight")]
    assert all(int((w != 0).sum()) * 4 == twin.kept(STEPS) * w.numel() for w in weights)


W = ((torch.arange(16.0) * 7 + 3) % 17 - 8.25).view(2, 8)
C = ((torch.arange(24.0) * 11 + 5) % 29 - 14.3).view(2, 4, 1, 3)


def attached(w: torch.Tensor, method: str, **options):
    """A layer that holds w, its optimizer that only adds up gradients (lr 1), and the handle."""
    layer = nn.Linear(*w.shape[::-1], bias=False) if w.dim() == 2 else nn.Conv2d(4, 2, (1, 3), bias=False)
    layer.weight.data = w.clone()
    model = nn.Sequential(layer)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, opt, gossamer.attach(model, method, optimizer=opt, **options)


def test_sr_ste_is_what_the_official_code_printed():
    model, opt, _ = attached(W, "sr_ste", pattern="2:4")
    out = [[-5.25, 0, -8.25, 0, 5.75, 0, 0, -7.25], [0, 6.75, 0, 3.75, -6.25, 0, 7.75, 0]]
    assert model[0].weight.tolist() == out
    grad = [0.0, 1.00035, 2.0, 2.99975, 4.0, 4.99915, 6.00055, 7.0]
    grad += [7.99995, 9.0, 9.99935, 11.0, 12.0, 13.00015, 14.0, 14.99955]
    (model[0].weight * torch.arange(16.0).view(2, 8)).sum().backward()
    original = model[0].parametrizations.weight.original
    assert original.grad.flatten().tolist() == list(range(16))
    opt.step()
    torch.testing.assert_close(original.grad.flatten(), torch.tensor(grad), rtol=0, atol=2e-6)


def test_convolutions_group_input_channels_as_the_official_nhwc_code_printed():
    out = [-9.3, 0, 12.7, 0, 0, 0, 0, 0, 0, 0, 13.7, 0, 0, -11.3, 0, 0, 0, 0, -14.3, 0, 0, 0, 0, 11.7]
    model, _, _ = attached(C, "sr_ste", pattern="1:4")
    torch.testing.assert_close(model[0].weight.flatten(), torch.tensor(out), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "shape, until, step, printed",
    [
        ("linear", 100, 30, [-5.25, 1.225, -8.25, -0.875]),
        ("linear", 100, 60, [-5.25, 0.7, -8.25, -0.5]),
        ("linear", 100, 130, [-5.25, 0.0, -8.25, 0.0]),
        ("exponential", 1000, 30, [-5.25, 0.5270899, -8.25, -0.3764928]),
        ("exponential", 1000, 60, [-5.25, 0.1587564, -8.25, -0.1133972]),
    ],
)
def test_the_fading_mask_is_what_the_official_code_printed(shape, until, step, printed):
    """Linear with c = 0.01, exponential with c = 0.04: ours reaches 0.01 after ln(100)/c steps."""
    end = until if shape == "linear" else math.log(100) / 0.04
    fade = get_method("decaying_mask")(total_steps=until, until=until, shape=shape).shrink.fade
    scaled = step if shape == "linear" else round(step * until / end)
    kept = select(W.abs(), "2:4", gossamer.core.Keep(2))
    left = fade(scaled) if shape == "linear" else 0.01 ** (step / end)
    assert fade(scaled) == pytest.approx(left, rel=5e-3)
    got = gossamer.core.StraightThrough(fade=left)(W, kept)[0, :4].tolist()
    assert got == pytest.approx(printed, abs=1e-6)


@pytest.mark.parametrize(
    "spec, begin, until, printed",
    [
        ("1:16", 4, 94, {4: 15, 22: 8, 40: 4, 58: 2, 76: 1}),
        ("2:8", 4, 54, {4: 7, 20: 4, 37: 2}),
        ("2:4", 4, 14, {4: 3, 9: 2}),
    ],
)
def test_stages_are_what_the_official_code_printed(spec, begin, until, printed):
    rule = get_method("decaying_structure")(pattern=spec, total_steps=100, begin=begin, until=until)
    assert dict(rule.budget.k.changes) == printed and rule.budget.k(0) == rule.pattern.pool_size


def test_a_stage_begins_on_its_step_however_seldom_the_support_is_chosen():
    rule = get_method("decaying_structure")(pattern="1:8", total_steps=400, every=150)
    assert [t for t in range(401) if rule.policy.due(t)] == [0, 100, 150, 200, 300]


def test_odd_ratios_come_to_n_at_last():
    stages = lambda spec: dict(get_method("decaying_structure")(pattern=spec, total_steps=30).budget.k.changes)
    assert stages("3:8") == {0: 7, 10: 4, 20: 3} and stages("1:2") == {0: 1} and stages("4:4") == {0: 4}


@pytest.mark.parametrize(
    "method, options, error, words",
    [
        ("decaying_structure", {"total_steps": 9, "pattern": "row"}, PatternError, "needs an N:M pattern"),
        ("decaying_structure", {"total_steps": 3, "pattern": "1:16"}, BudgetError, "5 stages .* do not fit"),
        ("decaying_structure", {"total_steps": 9, "until": 10}, BudgetError, "run ends at 9"),
        ("decaying_mask", {"total_steps": 9, "shape": "cubic"}, BudgetError, "'exponential' or 'linear'"),
        ("decaying_mask", {"total_steps": 9, "begin": 8}, BudgetError, "begin < until"),
        ("decaying_mask", {"total_steps": 9, "density": 0.3}, BudgetError, "leave one of the two out"),
        ("sr_ste", {"pull": -1.0}, BudgetError, "pull >= 0"),
        ("bdwp", {"pattern": "unstructured"}, PatternError, "write pattern='2:8'"),
        ("bdwp", {"pattern": "64:2:4"}, PatternError, "write pattern='2:8'"),
    ],
)
def test_what_makes_no_sense_is_refused(method, options, error, words):
    with pytest.raises(error, match=words):
        get_method(method)(**options)


def test_a_rule_without_a_handle_fades_by_step():
    rule = get_method("decaying_mask")(total_steps=100)
    w = torch.arange(1.0, 9.0).view(1, 8)
    assert rule.apply(w, {}, step=0)[0].tolist() == w.tolist()
    got, support = rule.apply(w, {}, step=75)
    assert isinstance(support, Support) and got.tolist() == [[0, 0, 3, 4, 0, 0, 7, 8]]
