"""Dynamic supports through attach: exact counts, empty slots, exact resumption, and the ways people train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core import get_method
from gossamer.core.errors import BudgetError, FileDamaged, PatternError, TargetError, UnknownName

MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}
MOVING = ("rigl", "set")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12)
    )


def loss(model: nn.Module, step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(6, 4, 4, 4, generator=g)
    return (model(x) - x.flatten(1)[:, :12]).square().mean()


def start(method: str = "rigl", make: str = "sgd", **options):
    model = net()
    opt = MAKERS[make](model.parameters())
    options = {"density": 0.25, "total_steps": 16, "every": 2, **options}
    return model, opt, gossamer.attach(model, method, optimizer=opt, **options)


def train(model: nn.Module, opt: torch.optim.Optimizer, handle, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        loss(model, step).backward()
        opt.step()
        handle.step()


def layers(model: nn.Module):
    return [(m.parametrizations.weight.original, m.parametrizations.weight[0].mask) for m in (model[0], model[4])]


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("make", MAKERS)
def test_counts_are_exact_and_everything_pruned_is_zero_at_every_step(method, make):
    model, opt, handle = start(method, make)
    counts = {n: s.count for n, s in handle.supports().items()}
    assert sum(counts.values()) == round(0.25 * (4 * 8 * 9 + 128 * 12))
    for step in range(16):
        before = [mask.clone() for _, mask in layers(model)]
        train(model, opt, handle, range(step, step + 1))
        assert {n: s.count for n, s in handle.supports().items()} == counts
        for (w, mask), old in zip(layers(model), before):
            assert not w[~mask].any() and not w.grad[~old].any()
            came = mask & ~old
            assert not w[came].any()
            slots = [s for s in opt.state[w].values() if s.shape == w.shape]
            assert slots and not any(s[~mask | came].any() for s in slots)
    assert handle.report().sad > 0


@pytest.mark.parametrize("method", MOVING)
@pytest.mark.parametrize("at", [3, 8, 9])
def test_resuming_is_bit_for_bit(method, at, tmp_path):
    model, opt, handle = start(method, "adamw")
    train(model, opt, handle, range(at))
    torch.save([x.state_dict() for x in (model, opt, handle)], tmp_path / "state.pt")
    train(model, opt, handle, range(at, 16))
    again = start(method, "adamw")
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True)):
        part.load_state_dict(state)
    train(*again, range(at, 16))
    for a, b in zip(model.state_dict().values(), again[0].state_dict().values()):
        assert torch.equal(a, b)
    assert handle.state_dict() == again[2].state_dict() and handle.report() == again[2].report()


def test_the_dense_gradient_lives_for_one_step_and_grad_stays_cut():
    model, opt, handle = start("rigl", every=4)
    for step in range(8):
        opt.zero_grad()
        loss(model, step).backward()
        assert bool(handle._gradients._caught) == ((step + 1) % 4 == 0)
        assert all(not w.grad[~mask].any() for w, mask in layers(model))
        opt.step()
        handle.step()
        assert not handle._gradients._caught
        assert all(not w._post_accumulate_grad_hooks for w, _ in layers(model)) or (step + 2) % 4 == 0


def test_accumulated_gradients_choose_what_one_large_batch_would():
    def grown(parts: int) -> dict[str, torch.Tensor]:
        model, opt, handle = start("rigl", every=1, total_steps=4)
        model.eval()  # batch statistics would differ between the parts
        x = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        for part in x.chunk(parts):
            ((model(part) - part.flatten(1)[:, :12]).square().mean() / parts).backward()
        opt.step()
        handle.step()
        return {n: s.kept for n, s in handle.supports().items()}

    whole, parts = grown(1), grown(4)
    assert all(torch.equal(whole[n], parts[n]) for n in whole)


def test_a_gradient_scaler_changes_nothing_and_a_skipped_step_defers_the_move():
    plain = start("rigl", every=1, total_steps=4)
    scaled = start("rigl", every=1, total_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(*plain, range(1))
    model, opt, handle = scaled
    scaler.scale(loss(model, 0)).backward()
    scaler.unscale_(opt)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(opt)
    scaler.update()
    handle.step()
    assert all(torch.equal(a[1], b[1]) for a, b in zip(layers(plain[0]), layers(model)))

    model, opt, handle = start("rigl", every=2, total_steps=8)
    before = handle.supports()["4"].kept.clone()
    train(model, opt, handle, range(1))
    (loss(model, 1) * float("inf")).backward()
    opt.zero_grad()  # the step is skipped
    handle.step()
    assert torch.equal(handle.supports()["4"].kept, before) and handle.state_dict()["waiting"]
    train(model, opt, handle, range(2, 3))
    assert not torch.equal(handle.supports()["4"].kept, before) and not handle.state_dict()["waiting"]


def test_bfloat16_autocast_keeps_counts_and_float32_weights():
    model, opt, handle = start("rigl")
    count = handle.density
    for step in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model, step)
        opt.zero_grad()
        value.backward()
        opt.step()
        handle.step()
    assert handle.density == count and model[0].weight.dtype == torch.float32


def test_a_compiled_step_moves_the_same_links():
    plain, compiled = start("rigl"), start("rigl")
    train(*plain, range(8))
    model, opt, handle = compiled
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(fast, opt, handle, range(8))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(layers(plain[0]), layers(model)))
    assert handle.report().flops.dense == 0  # nothing was counted
    handle.observe(torch.zeros(6, 4, 4, 4))
    train(fast, opt, handle, range(8, 9))
    assert handle.report().flops.dense > 0


def test_an_average_of_the_weights_follows_the_support():
    model, opt, handle = start("set")
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(8):
        train(model, opt, handle, range(step, step + 1))
        mean.update_parameters(model)
    for name in (0, 4):
        assert not mean.module[name].weight[~model[name].parametrizations.weight[0].mask].any()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def test_tied_weights_have_one_support_in_any_parameter_group():
    model = Tied()
    groups = [{"params": [model.a.weight], "weight_decay": 0.1}, {"params": [model.a.bias, model.b.bias], "lr": 0.1}]
    opt = torch.optim.AdamW(groups, lr=0.01)
    handle = gossamer.attach(model, "rigl", density=0.5, optimizer=opt, total_steps=8, every=2)
    weight = model.a.parametrizations.weight.original
    for _ in range(5):
        opt.zero_grad()
        model(torch.randn(3, 8)).square().mean().backward()
        off = ~handle.supports()["a"].kept
        assert not weight.grad[off].any() and not model.b.weight[off].any()
        opt.step()
        handle.step()
    assert [r.name for r in handle.report()] == ["a"] and handle.density == 0.5
    assert handle.report().flops.dense == 5 * 6 * 64 * 3 * 2
    handle.remove()
    assert model.b.weight is model.a.weight and int((model.a.weight != 0).sum()) == 32


def test_the_report_counts_the_work_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = gossamer.attach(
        model, "rigl", density=0.25, optimizer=opt, total_steps=4, every=2, until=2, allocation="uniform"
    )
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(7, 10)).square().mean().backward()
        opt.step()
        handle.step()
    report = handle.report()
    k, n, rows = 50, 200, 7
    assert report.flops.forward == 3 * 2 * k * rows
    assert report.flops.backward == 2 * (4 * k * rows) + (2 * k + 2 * n) * rows  # the second step needs all
    assert report.flops.dense == 3 * 6 * n * rows
    [layer] = report
    assert (layer.kept, layer.size, layer.density) == (k, n, 0.25)
    assert layer.moved == 2 * layer.grown
    kept = handle.supports()["0"].kept
    assert layer.dead_outputs == int((kept.sum(1) == 0).sum()) and layer.dead_inputs == int((kept.sum(0) == 0).sum())
    assert "rigl, step 3: density 0.2500" in str(report)


def test_dead_channels_of_grouped_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).view(4, 2, 1, 1)
    [layer] = gossamer.attach(model, "magnitude", density=0.5).report()
    assert (layer.dead_outputs, layer.dead_inputs) == (1, 1)


def test_densities_by_rule_and_by_name():
    shapes = {"0": (8, 4, 3, 3), "4": (12, 128)}
    for rule in ("uniform", "er", "erk"):
        handle = start("static", allocation=rule, every=None)[2]
        want = gossamer.core.allocation(rule)(shapes, 0.25) if rule != "uniform" else dict.fromkeys(shapes, 0.25)
        assert {n: round(s.density, 6) for n, s in handle.supports().items()} == {
            n: round(d, 6) for n, d in want.items()
        }
    named = start("rigl", allocation={"0": 0.5, "4": 0.125})[2]
    assert [r.density for r in named.report()] == [0.5, 0.125]
    model = net()
    handle = gossamer.attach(model, "random", sparsity=0.75, allocation="erk")
    assert handle.density == 0.25


def test_patterns_stay_patterns():
    model = nn.Sequential(nn.Linear(16, 8))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = gossamer.attach(model, "rigl", pattern="2:4", optimizer=opt, total_steps=8, every=2)
    before = handle.supports()["0"].kept.clone()
    for _ in range(4):
        opt.zero_grad()
        model(torch.randn(5, 16)).square().mean().backward()
        opt.step()
        handle.step()
    kept = handle.supports()["0"].kept
    assert (kept.view(-1, 4).sum(1) == 2).all() and not torch.equal(kept, before)


def test_what_cannot_be_is_refused_in_words():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for bad in ({"density": 0.0}, {"density": 1.5}, {"sparsity": 1.0}, {"density": -1.0}):
        with pytest.raises(BudgetError, match="above 0 and up to 1"):
            gossamer.attach(model, "rigl", optimizer=opt, total_steps=1000, **bad)
    with pytest.raises(BudgetError, match="same thing"):
        gossamer.attach(model, "rigl", optimizer=opt, total_steps=1000, density=0.5, sparsity=0.5)
    with pytest.raises(TargetError, match="total_steps="):
        gossamer.attach(model, "rigl", optimizer=opt, density=0.5)
    with pytest.raises(BudgetError, match="would never move"):
        gossamer.attach(model, "rigl", optimizer=opt, density=0.5, total_steps=50)
    with pytest.raises(BudgetError, match="run ends at 500"):
        gossamer.attach(model, "rigl", optimizer=opt, density=0.5, total_steps=500, until=600)
    with pytest.raises(TargetError, match="optimizer="):
        gossamer.attach(model, "rigl", density=0.5, total_steps=1000)
    with pytest.raises(TargetError, match="does not own the weights of 2 of 2"):
        gossamer.attach(model, "static", density=0.5, optimizer=torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(PatternError, match="0 < N <= M"):
        gossamer.attach(model, "static", pattern="5:4")
    with pytest.raises(PatternError, match="not a multiple of 16"):
        gossamer.attach(model, "static", pattern="2:16")
    with pytest.raises(UnknownName, match="erk"):
        gossamer.attach(model, "static", density=0.5, allocation="ekr")
    with pytest.raises(TargetError, match="names no density for 4"):
        gossamer.attach(model, "static", density=0.5, allocation={"0": 0.5})
    with pytest.raises(TargetError, match=r"names '5'.*known: 0, 4"):
        gossamer.attach(model, "static", density=0.5, allocation={"0": 0.5, "4": 0.5, "5": 0.5})
    for bad in (0.0, 1.5):
        with pytest.raises(BudgetError, match=f"gives layer '4' {bad:g}"):
            gossamer.attach(model, "static", density=0.5, allocation={"0": 0.5, "4": bad})
    with pytest.raises(UnknownName) as said:  # only prune measures it
        gossamer.attach(model, "static", density=0.5, allocation="sensitivity")
    assert str(said.value).count("sensitivity") == 1
    assert set(model.state_dict()) == set(net().state_dict())
    handle = gossamer.attach(model, "static", density=0.5, optimizer=opt)
    with pytest.raises(TargetError, match="still carries a mask"):
        gossamer.attach(model, "static", density=0.5, optimizer=opt)
    with pytest.raises(FileDamaged, match="'steps'"):
        handle.load_state_dict({})
    with pytest.raises(FileDamaged, match="of method 'rigl'"):
        handle.load_state_dict({**handle.state_dict(), "method": "rigl"})


def test_a_move_without_a_gradient_says_so():
    handle = start("rigl", every=1)[2]
    with pytest.raises(TargetError, match=r"loss\.backward"):
        handle.step()


def test_an_optimizer_that_was_to_come_later_is_asked_for_where_links_move():
    model = net()
    handle = gossamer.attach(model, "set", density=0.25, total_steps=8, every=2, optimizer="later")
    with pytest.raises(TargetError, match=r"handle\.follow"):
        handle.step()
    with pytest.raises(TargetError, match="does not own"):
        handle.follow(torch.optim.SGD(net().parameters(), lr=0.1))
    handle.follow(torch.optim.SGD(model.parameters(), lr=0.1))


def test_removing_leaves_no_hook_and_no_mask():
    model, _, handle = start("rigl", every=1)
    handle.remove()
    assert not model[0]._forward_hooks and not model[0].weight._post_accumulate_grad_hooks
    assert set(model.state_dict()) == set(net().state_dict())
    copy.deepcopy(model)


def test_names_of_methods():
    assert get_method("rigl").paper == "arXiv:1911.11134" and get_method("static").row == "P004"


def test_positions_are_counted_without_gradients_too_and_a_pass_that_reaches_nothing_is_refused():
    model, opt, handle = start("static", every=None)
    with torch.no_grad():
        handle.observe(torch.zeros(6, 4, 4, 4))
    train(model, opt, handle, range(1))
    assert handle.report().flops.dense == 6 * (4 * 8 * 9 * 6 * 16 + 128 * 12 * 6)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.shape[0] > 1 else x

    routed = gossamer.attach(Routed(), "magnitude", density=0.5)
    routed.observe(torch.zeros(3, 4))
    with pytest.raises(TargetError, match="none of the held layers"):
        routed.observe(torch.zeros(1, 4))
    routed.step()
    assert routed.report().flops.dense == 6 * 16 * 3 and routed.model.training


def test_counts_follow_a_model_state_that_was_loaded_without_the_handles():
    (model, _, handle), (other, *_) = start("static", every=None), start("static", every=None, density=0.5)
    assert handle.density == 0.25
    model.load_state_dict(other.state_dict())
    assert handle.density == 0.5 == handle.report().density


def test_data_are_read_for_methods_that_need_them_only():
    def read():
        pytest.fail("the data were read")
        yield

    assert gossamer.attach(net(), "static", density=0.25, data=read()).density == 0.25
