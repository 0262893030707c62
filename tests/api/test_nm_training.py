"""Weights that keep learning while masked, and layers with two ways, in all the ways people train."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.errors import NonFiniteError, PatternError, TargetError

METHODS = {
    "sr_ste": {"pull": 0.05},
    "decaying_mask": {"until": 6},
    "decaying_structure": {"pattern": "1:4"},
    "bdwp": {"pattern": "1:4", "pull": 0.05},
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12)
    )


def loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.flatten(1)[:, :12]).square().mean()


def start(method: str, make=lambda p: torch.optim.AdamW(p, lr=0.01)):
    model = net()
    opt = make(model.parameters())
    return model, opt, gossamer.attach(model, method, optimizer=opt, total_steps=10, **METHODS[method])


def train(model: nn.Module, opt: torch.optim.Optimizer, handle, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        loss(model, step).backward()
        opt.step()
        handle.step()


def same(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [3, 7])
def test_resuming_is_bit_for_bit(method, at, tmp_path):
    parts = start(method)
    train(*parts, range(at))
    torch.save([x.state_dict() for x in parts], tmp_path / "state.pt")
    train(*parts, range(at, 10))
    again = start(method)
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    train(*again, range(at, 10))
    same(parts[0], again[0])
    assert parts[2].state_dict() == again[2].state_dict() and parts[2].report() == again[2].report()


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_is_the_same_and_moving_supports_compile_nothing_anew(method):
    torch._dynamo.reset()  # limits count per process
    plain, compiled = start(method), start(method)
    train(*plain, range(8))
    model, opt, handle = compiled
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    train(torch.compile(model, backend=backend, fullgraph=True), opt, handle, range(8))
    assert len(graphs) == 2  # the first step counts positions, see Meter
    same(plain[0], model)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_learn_and_leave_with_the_handle(method):
    model, opt, handle = start(method)
    train(model, opt, handle, range(5))
    held = model[4].parametrizations.weight
    off = ~held[0].mask
    assert held.original[off].all() and held.original.grad[off].count_nonzero() > 0.9 * off.sum()  # but for dead inputs
    twin = copy.deepcopy(model)
    if held[0].back is not None:
        assert twin[4].forward.__self__ is twin[4]
    out = model.eval()(torch.ones(1, 4, 4, 4))
    assert torch.equal(twin.eval()(torch.ones(1, 4, 4, 4)), out)
    handle.remove()
    assert set(model.state_dict()) == set(net().state_dict()) and "forward" not in model[4].__dict__
    assert not model[4].weight[off].any() and not opt._optimizer_step_pre_hooks


def test_the_pull_counts_once_however_the_gradient_was_made():
    whole, parts, scaled, closed = (start("sr_ste", lambda p: torch.optim.SGD(p, lr=0.1)) for _ in range(4))
    for model, *_ in (whole, parts, scaled, closed):
        model.eval()  # batch statistics would differ between the parts
    x = torch.randn(8, 4, 4, 4)
    value = lambda model, x: (model(x) - x.flatten(1)[:, :12]).square().mean()
    value(whole[0], x).backward()
    whole[1].step()
    for part in x.chunk(4):
        (value(parts[0], part) / 4).backward()
    parts[1].step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(value(scaled[0], x)).backward()
    scaler.step(scaled[1])

    def closure():
        closed[1].zero_grad()
        made = value(closed[0], x)
        made.backward()
        return made

    assert closed[1].step(closure) is not None
    want = whole[0][4].parametrizations.weight.original
    for model, *_ in (parts, scaled, closed):
        torch.testing.assert_close(model[4].parametrizations.weight.original, want, rtol=1e-5, atol=1e-6)


def test_a_fused_optimizer_that_unscales_within_its_step_pulls_as_much():
    plain, fused = (start("sr_ste", lambda p: torch.optim.SGD(p, lr=0.1, fused=True)) for _ in range(2))
    loss(plain[0], 0).backward()
    plain[1].step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(fused[0], 0)).backward()
    scaler.step(fused[1])
    a, b = (model[4].parametrizations.weight.original for model, *_ in (plain, fused))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def test_tied_weights_are_pulled_once_and_have_two_ways_each():
    model = Tied()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = gossamer.attach(model, "bdwp", pattern="2:4", pull=0.5, optimizer=opt)
    w = model.a.parametrizations.weight.original
    before = w.detach().clone()
    model(torch.randn(3, 8)).square().mean().backward()
    gradient = w.grad.clone()
    opt.step()
    off = ~handle.supports()["a"].kept
    torch.testing.assert_close(w.detach(), before - gradient - 0.5 * before * off)
    handle.remove()
    assert model.b.weight is model.a.weight and "forward" not in model.b.__dict__


GEOMETRIES = [
    nn.Linear(8, 8),
    nn.Linear(8, 16, bias=False),
    nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular"),
    nn.Conv2d(8, 16, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(8, 8, 4, padding="same"),
    nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False),
    nn.Conv3d(8, 4, 2, groups=1),
]


@pytest.mark.parametrize("layer", GEOMETRIES, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_two_ways_that_keep_everything_are_the_plain_layer(layer, batched):
    torch.manual_seed(1)
    plain = copy.deepcopy(layer).double()
    model = nn.Sequential(copy.deepcopy(plain))
    gossamer.attach(model, "bdwp", pattern="4:4")
    shape = [8] if isinstance(layer, nn.Linear) else [8] + [6] * (layer.weight.dim() - 2)
    x = torch.randn(*[3] * batched, *shape, dtype=torch.float64)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [model(xs[0]), plain(xs[1])]
    torch.testing.assert_close(*outs)
    for out in outs:
        (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(model[0].parametrizations.weight.original.grad, plain.weight.grad)
    if plain.bias is not None:
        torch.testing.assert_close(model[0].bias.grad, plain.bias.grad)


def test_the_gradient_by_the_inputs_is_another_functions_by_design():
    for pattern, agrees in (("2:4", False), ("4:4", True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8)).double()
        gossamer.attach(model, "bdwp", pattern=pattern)
        x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(model, (x,), raise_exception=False) == agrees


def test_grouped_convolutions_group_outputs_within_their_groups():
    model = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))
    handle = gossamer.attach(model, "bdwp", pattern="1:4")
    held = model[0].parametrizations.weight[0]
    assert (held.back.view(2, 4, 4).sum(1) == 1).all() and (handle.supports()["0"].kept.view(8, 4).sum(1) == 1).all()
    with pytest.raises(PatternError, match="axis 0 has length 2, not a multiple of 4"):
        gossamer.attach(nn.Sequential(nn.Conv2d(16, 8, 1, groups=4)), "bdwp", pattern="1:4")


def test_bfloat16_autocast_computes_both_ways_in_bfloat16():
    model, opt, handle = start("bdwp")
    with torch.autocast("cpu", torch.bfloat16):
        assert model[4](torch.randn(2, 128)).dtype == torch.bfloat16
        value = loss(model, 0)
    value.backward()
    opt.step()
    handle.step()
    assert model[0].parametrizations.weight.original.grad.dtype == torch.float32 and handle.density == 0.25


def test_two_ways_in_the_layout_of_gpt2():
    transformers = pytest.importorskip("transformers")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(8, 16)).double()  # stores [16 inputs, 8 outputs]
    gossamer.attach(model, "bdwp", pattern="1:4")
    held = model[0].parametrizations.weight
    assert (held[0].mask.view(4, 4, 8).sum(1) == 1).all() and (held[0].back.view(16, 2, 4).sum(2) == 1).all()
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, x @ (held.original * held[0].mask) + model[0].bias)
    torch.testing.assert_close(x.grad, torch.ones(3, 8, dtype=torch.float64) @ (held.original * held[0].back).t())


@pytest.mark.parametrize(
    "method, options, forward, back",
    [
        ("sr_ste", {"pattern": "1:4"}, 3 * 0.25, 3 * 1.25),
        ("bdwp", {"pattern": "2:8"}, 3 * 0.25, 3 * 1.25),
        ("decaying_mask", {"pattern": "1:4", "until": 2}, 2 + 0.25, 2 * 2 + 1.25),
        ("decaying_structure", {"pattern": "1:4"}, 0.75 + 0.5 + 0.25, 1.75 + 1.5 + 1.25),
    ],
)
def test_the_report_counts_the_work_by_hand(method, options, forward, back):
    model = nn.Sequential(nn.Linear(16, 8))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = gossamer.attach(model, method, optimizer=opt, total_steps=3, **options)
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(7, 16)).square().mean().backward()
        opt.step()
        handle.step()
    flops, unit = handle.report().flops, 2 * 7 * 16 * 8
    assert (flops.forward, flops.backward, flops.dense) == (forward * unit, back * unit, 9 * unit)


def test_what_cannot_be_held_is_refused_in_words():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(6, 4))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PatternError, match=r"layer '0'.*length 3, not a multiple of 4.*skip=\['0', '2'\]"):
        gossamer.attach(model, "sr_ste", optimizer=opt)
    gossamer.attach(model, "sr_ste", optimizer=opt, skip=["0", "2"]).remove()
    with pytest.raises(TargetError, match="within the optimizer's step"):
        gossamer.attach(model, "sr_ste", skip=["0", "2"])
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(TargetError, match="'out_proj' is a NonDynamicallyQuantizableLinear"):
        gossamer.attach(attention, "bdwp", pattern="1:4")
    assert set(attention.state_dict()) == set(nn.MultiheadAttention(8, 2).state_dict())


def test_a_weight_that_overflowed_is_named():
    model, _, handle = start("sr_ste")
    model[4].parametrizations.weight.original.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer '4' has 1 NaN"):
        handle.step()
    model[4].parametrizations.weight.original.data[0, :2] = torch.finfo(torch.float32).max  # the sum overflows
    handle.step()


def test_a_forward_that_somebody_replaced_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = replaced = functools.partial(model[0].forward)  # as accelerate's hooks do
    with pytest.raises(TargetError, match="layer '0' is replaced already"):
        gossamer.attach(model, "bdwp", pattern="1:4")
    gossamer.attach(model, "magnitude", density=0.5).remove()
    assert model[0].forward is replaced


@pytest.mark.parametrize("method", ["sr_ste", "bdwp"])
def test_an_optimizer_that_was_promised_is_asked_for_at_the_first_step(method):
    model = net()
    handle = gossamer.attach(model, method, optimizer="later", **METHODS[method])
    with pytest.raises(TargetError, match=r"within the optimizer's step; call handle\.follow"):
        handle.step()
    handle.follow(torch.optim.SGD(model.parameters(), lr=0.1))
    handle.step()
    assert handle.steps == 1
