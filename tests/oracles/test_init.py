"""Pruning at initialisation, against naive twins by hand-written derivatives, and values that official code printed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_net import LR, MOMENTUM, SIZES, batch, gradients, net, numbers
from torch import nn
from torch.nn import functional

import gossamer
from gossamer.attach.start import first_supports
from gossamer.attach.targets import find
from gossamer.core import get_method, pattern
from gossamer.core.errors import BudgetError, CalibrationError, NonFiniteError, PatternError, TargetError, UnknownName
from gossamer.score import (
    HessianGradient,
    Trial,
    gradient_flow,
    gradient_times_weight,
    loss_gradient,
    synaptic_flow,
    weight_times_flow,
)

DECAY = 0.01
LAYERS = ("0", "2", "4")


def toy() -> nn.Sequential:
    """4-3-3-2 with ReLU and no bias: the weights and data of the printed values below."""
    model = nn.Sequential(
        nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False)
    ).double()
    count = lambda n: torch.arange(1, n + 1, dtype=torch.float64)
    model[0].weight.data = torch.sin(count(12) * 1.3).view(3, 4)
    model[2].weight.data = torch.cos(count(9) * 0.7).view(3, 3)
    model[4].weight.data = torch.sin(count(6) * 2.1).view(2, 3)
    return model


X = torch.cos(torch.arange(32, dtype=torch.float64) * 0.9).view(8, 4)
Y = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]
TRIAL = Trial.of(BATCHES, functional.cross_entropy)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}.weight": model.get_submodule(n).weight for n in LAYERS}


def scores(probe, score, model=None, trial=TRIAL) -> list[list[float]]:
    model = model or toy()
    found = probe(model, weights(model), trial)
    return [score(w, found[n]).flatten().tolist() for n, w in weights(model).items()]


def rows(text: str) -> list[list[float]]:
    return [[float(x) for x in layer.split()] for layer in text.split(";")]


def share(layers: list[list[float]], signed: bool = False) -> list[list[float]]:
    """As Synaptic-Flow's code does: divided by the sum of all, for GraSP by |sum| + 1e-10, with sums over two batches
    both of g and of Hg where ours are means."""
    total = sum(map(sum, layers))
    return [[x / (abs(total) + 1e-10 / 4 if signed else total) for x in layer] for layer in layers]


def masks(model: nn.Module, method: str, **options) -> list[list[int]]:
    handle = gossamer.attach(model, method, data=BATCHES, loss=functional.cross_entropy, **options)
    return [handle.supports()[n].kept.flatten().int().tolist() for n in LAYERS]


# Printed by SNIP, GraSP and SynFlow of Pruners/pruners.py, ganguli-lab/Synaptic-Flow at commit 9dfa57aa, run in float64
# on `toy` with its layers as weight·weight_mask; masks: p.mask(0.3, "global"), which keeps 9 of 27, SynFlow's after ten
# rounds of prune_loop's exponential schedule to 1/3. GRASP_FIRST was returned by GraSP() of pruner/GraSP.py,
# alecwangcq/GraSP at f17d87ac, for ratio 2/3, four samples of each class and reinit=False: it keeps the entry at its
# threshold too, so 10.
SNIP = rows(
    """
    0.00105483467 0.0004588111142 8.097136649e-06 0.0007733694419 0.0007799970233 0.00128734102 0.000645563707
    0.003149350648 0.003259101741 0.001084163941 0.001055083845 0.0004212738523;
    0.004349519216 0.0006407521015 0.0001813856908 0 0 0 0.002070601126 0.005211877085 0.003832681189;
    0.4820968694 0 0.00345077265 0.4772879838 0 0.006900569672
    """
)
SNIP_MASKS = [[0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1]]
GRASP = rows(
    """
    0.2017308833 0.0876058501 -0.001317878494 0.1480323488 0.02322867851 0.04914044765 -0.01493335619 0.08890283719
    -0.03372461381 0.0002146049634 -0.04304692884 -0.005898970819;
    0.4010820058 0.0589384207 -0.01659404438 0 0 0 0.03486055011 0.08738218366 -0.06584303567;
    0.001481770134 0 -0.000223828543 -0.001466989571 0 0.0004475938035
    """
)
GRASP_MASKS = [[1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]
GRASP_FIRST = [[1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]
SYNFLOW = rows(
    """
    2.864992373 1.532764208 2.044967113 2.626816822 0.4240182926 1.968206898 0.6289677867 1.631710605 1.353464543
    0.7463168477 1.752742308 0.1913961807;
    4.007617694 0.6892232033 1.974399238 5.033228484 3.871340838 1.954708274 0.0286943371 0.0923395419 0.1148123677;
    3.352339755 5.404463604 0.0786228252 3.31890038 5.454813991 0.1572234215
    """
)
SYNFLOW_MASKS = [[1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0]]


def close(got: list[list[float]], printed: list[list[float]]) -> None:
    for a, b in zip(got, printed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_snip_against_printed_values():
    close(share(scores(loss_gradient, gradient_times_weight)), SNIP)
    assert masks(toy(), "snip", density=1 / 3) == SNIP_MASKS


def test_grasp_against_printed_values():
    close(share(scores(HessianGradient(), gradient_flow), signed=True), GRASP)
    assert masks(toy(), "grasp", density=1 / 3) == GRASP_MASKS
    assert masks(toy(), "grasp", density=10 / 27) == GRASP_FIRST


def test_synflow_against_printed_values():
    got = scores(synaptic_flow, weight_times_flow)
    close(got, SYNFLOW)
    assert masks(toy(), "synflow", density=1 / 3, rounds=10) == SYNFLOW_MASKS


def best(by_layer: dict[str, np.ndarray], d: float) -> dict[str, np.ndarray]:
    flat = np.concatenate([s.ravel() for s in by_layer.values()])
    won = np.zeros(flat.size, bool)
    won[np.argsort(-flat, kind="stable")[: math.floor(d * flat.size + 0.5)]] = True
    parts = np.split(won, np.cumsum([s.size for s in by_layer.values()])[:-1])
    return {n: part.reshape(s.shape) for part, (n, s) in zip(parts, by_layer.items())}


def snip_twin(w, b, batches, d):
    g = [gradients(w, b, data)[0] for data in batches]
    return best({n: np.abs(w[n] * sum(x[n] for x in g)) for n in w}, d)


def iterative_snip_twin(w, b, batches, d, rounds=5):
    kept = {n: np.ones_like(x, bool) for n, x in w.items()}
    for r in range(1, rounds + 1):
        cut = {n: w[n] * kept[n] for n in w}
        g = [gradients(cut, b, data)[0] for data in batches]
        worth = {n: np.abs(cut[n] * sum(x[n] for x in g)) for n in w}
        kept = best({n: np.where(kept[n], worth[n], -np.inf) for n in w}, d ** (r / rounds))
    return kept


def grasp_twin(w, b, batches, d, temperature=200.0):
    """Hg by central differences along g."""
    total = lambda at: {n: sum(gradients(at, b, data, temperature)[0][n] for data in batches) for n in w}
    g = total(w)
    far = 1e-4 / max(np.abs(x).max() for x in g.values())
    ahead, behind = (total({n: w[n] + sign * far * g[n] for n in w}) for sign in (1, -1))
    return best({n: w[n] * (ahead[n] - behind[n]) for n in w}, d)


def synflow_twin(w, b, batches, d, rounds=100):
    kept = {n: np.ones_like(x, bool) for n, x in w.items()}
    for r in range(1, rounds + 1):
        first, last = (np.abs(w[n]) * kept[n] for n in ("0", "2"))
        hidden = first.sum(1) + np.abs(b["0"])
        worth = {"0": first * last.sum(0)[:, None], "2": last * hidden[None]}
        kept = best({n: np.where(kept[n], worth[n], -np.inf) for n in w}, d ** (r / rounds))
    return kept


TWINS = [
    ("snip", {}, snip_twin, nn.Tanh),
    ("snip", {"rounds": 5}, iterative_snip_twin, nn.Tanh),
    ("grasp", {}, grasp_twin, nn.Tanh),
    ("synflow", {}, synflow_twin, nn.ReLU),
]


@pytest.mark.parametrize("method, options, twin, kind", TWINS)
def test_twenty_steps(method, options, twin, kind):
    model, shown = net(kind), [batch(100), batch(101)]
    w, b = numbers(model)
    m = twin(w, b, shown, 0.2)
    opt = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    handle = gossamer.attach(model, method, density=0.2, optimizer=opt, data=shown, loss=functional.mse_loss, **options)
    assert handle.density == pytest.approx(0.2, abs=0.5 / 480)
    for n in SIZES:
        assert (handle.supports()[n].kept.numpy() == m[n]).all()
    if kind is nn.ReLU:
        return  # the twin's derivatives are those of tanh
    w = {n: w[n] * m[n] for n in w}
    v, vb = {n: np.zeros_like(x) for n, x in w.items()}, {n: np.zeros_like(x) for n, x in b.items()}
    for t in range(1, 21):
        opt.zero_grad()
        x, y = batch(t)
        functional.mse_loss(model(x), y).backward()
        opt.step()
        handle.step()
        dw, db = gradients(w, b, batch(t))
        for n in w:
            v[n] = MOMENTUM * v[n] + (dw[n] + DECAY * w[n]) * m[n]
            vb[n] = MOMENTUM * vb[n] + db[n] + DECAY * b[n]
            w[n], b[n] = w[n] - LR * v[n], b[n] - LR * vb[n]
            np.testing.assert_allclose(model[int(n)].weight.detach().numpy(), w[n], atol=1e-12)
            assert (handle.supports()[n].kept.numpy() == m[n]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.02, 1), st.integers(-20, 20), st.sampled_from(["snip", "grasp", "synflow"]))
def test_counts_are_exact_and_the_loss_may_be_scaled(seed, d, power, method):
    torch.manual_seed(seed % 1000)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    data = (torch.randn(5, 6), torch.randn(5, 4))
    targets = find(model).targets
    rule = get_method(method)(density=d)

    def chosen(loss):
        return first_supports(model, targets, rule, {t.name: rule for t in targets}, Trial.of(data, loss))

    plain = chosen(functional.mse_loss)
    assert sum(s.count for s in plain.values()) == math.floor(d * 90 + 0.5)
    assert chosen(lambda out, y: functional.mse_loss(out, y) * 2.0**power) == plain


class Residual(nn.Module):
    """Convolution, batch norm, pooling, a strided and a grouped convolution; all paths cross each layer but `side`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.side = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.avg_pool2d(self.norm(self.stem(x)).relu(), 2)
        x = (self.deep(x) + self.side(x)).relu()
        return self.head(x.mean((2, 3)))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_synaptic_flow_is_conserved_from_layer_to_layer(seed, d):
    model = Residual()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (torch.rand(p.shape, generator=g) < d))
        model.norm.bias.zero_()
    names = [f"{n}.weight" for n in ("stem", "deep", "side", "head")]
    found = synaptic_flow(model, {n: model.get_parameter(n) for n in names}, Trial.of(torch.zeros(4, 3, 6, 6), None))
    sums = {n: float(weight_times_flow(model.get_parameter(n), found[n]).sum()) for n in names}
    # batch norm at initialisation scales each channel alike, so it keeps the sum too
    total = pytest.approx(sums["head.weight"], rel=1e-9)
    assert sums["stem.weight"] == total and sums["deep.weight"] + sums["side.weight"] == total


def deep(depth: int, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [x for _ in range(depth) for x in (nn.Linear(width, width, bias=False), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 4, bias=False))


def test_synflow_empties_no_layer_where_snip_does():
    data = (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 4)
    lost = {}
    for method in ("snip", "synflow"):
        model = deep(12)
        with torch.no_grad():
            model[0].weight.mul_(1e-3)  # a layer of small values; synflow's sums do not see it
            model[4].weight.mul_(1e3)
        handle = gossamer.attach(model, method, density=0.005, data=data, loss=functional.cross_entropy)
        lost[method] = handle.report().collapsed
        assert handle.density == pytest.approx(0.005, abs=1e-4)
        assert ("collapsed, nothing kept" in str(handle.report())) == bool(lost[method])
    assert lost["snip"] and not lost["synflow"]


def test_flow_that_overflows_is_refused_and_float32_would_have():
    model = deep(40)
    data = torch.ones(1, 32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
    assert gossamer.attach(copy.deepcopy(model), "synflow", density=0.1, data=data).density == pytest.approx(
        0.1, abs=1e-4
    )
    flow = synaptic_flow(model, {"0.weight": model[0].weight}, Trial.of(data, None))["0.weight"]["flow"]
    assert not flow.float().isfinite().all()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e10)
    with pytest.raises(NonFiniteError, match="flow of layer '0'"):
        gossamer.attach(model, "synflow", density=0.1, data=data)


def busy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 6)
    )


PICTURES = (torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(7)), torch.arange(9) % 6)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_a_probe_leaves_no_trace(method):
    model = busy()
    model[5].weight.requires_grad_(False)
    state, lots = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    trial, targets, rule = Trial.of(PICTURES, functional.cross_entropy), find(model).targets, get_method(method)()
    with torch.no_grad():
        first_supports(model, targets, rule, {t.name: rule for t in targets}, trial)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    assert torch.equal(lots, torch.get_rng_state()) and model[3].training
    assert all(p.grad is None for p in model.parameters())
    assert model[0].weight.requires_grad and not model[5].weight.requires_grad


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_training_goes_on_in_every_way(method, kind):
    """Low precision, accumulation, autocast, a compiled graph: the support stays, zeros stay zero."""
    model = busy().to(kind)
    x, y = PICTURES[0].to(kind), PICTURES[1]
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = gossamer.attach(model, method, density=0.1, optimizer=opt, data=(x, y), loss=functional.cross_entropy)
    before = {n: s.kept.clone() for n, s in handle.supports().items()}
    assert sum(int(k.sum()) for k in before.values()) == round(0.1 * (216 + 768))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        opt.zero_grad()
        for part in (slice(0, 5), slice(5, 9)):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.float32):
                functional.cross_entropy(fast(x[part]).float(), y[part]).div(2).backward()
        opt.step()
        handle.step()
    for n, kept in before.items():
        layer = model.get_submodule(n)
        w = layer.parametrizations.weight.original
        assert torch.equal(handle.supports()[n].kept, kept) and not w[~kept].any() and not w.grad[~kept].any()
        assert not any(s[~kept].any() for s in opt.state[w].values() if s.shape == w.shape)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.up, self.down = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
        self.again = nn.Linear(6, 6)
        self.again.weight, self.down.weight = self.up.weight, self.words.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.down(self.again(self.up(self.words(ids)).relu()))
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Output(loss, logits)


class Output:
    def __init__(self, loss, logits) -> None:
        self.loss, self.logits = loss, logits


IDS = torch.arange(8).view(2, 4)


def test_tied_weights_and_models_that_return_their_loss():
    model = Tied()
    data = {"ids": IDS, "labels": IDS + 1}
    handle = gossamer.attach(model, "snip", density=0.5, data=data, targets=["up", "down"])
    assert sum(r.kept for r in handle.report()) == 48
    handle.remove()
    model = Tied()
    twice = model.up.weight.detach().clone()
    with torch.no_grad():
        model.again.weight = nn.Parameter(twice.clone())
    split = [f"{n}.weight" for n in ("up", "again")]
    apart = loss_gradient(model, {n: model.get_parameter(n) for n in split}, Trial.of(data, None))
    tied = Tied()
    both = loss_gradient(tied, {"up.weight": tied.up.weight}, Trial.of(data, None))["up.weight"]["gradient"]
    torch.testing.assert_close(both, sum(x["gradient"] for x in apart.values()))
    loss = lambda out, held: functional.cross_entropy(out.logits.flatten(0, 1), held["labels"].flatten())
    assert gossamer.attach(Tied(), "grasp", density=0.5, data=data, loss=loss, targets=["up"]).density == 0.5
    assert gossamer.attach(Tied(), "synflow", density=0.5, data=data, targets=["up", "down"]).density == 0.5
    with pytest.raises(CalibrationError, match="temperature=1"):
        gossamer.attach(Tied(), "grasp", density=0.5, data=data)
    assert gossamer.attach(Tied(), "grasp", density=0.5, temperature=1, data=data).density == 0.5


def test_attention_has_its_second_derivative():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    data = (torch.randn(3, 5, 8), torch.randn(3, 5, 8))
    handle = gossamer.attach(model, "grasp", density=0.25, data=data, loss=functional.mse_loss, targets=["linear*"])
    assert handle.density == 0.25


def test_prune_takes_the_same_supports():
    for method in ("snip", "grasp", "synflow"):
        want = masks(toy(), method, density=0.3)
        model = toy()
        report = gossamer.prune(model, method, density=0.3, data=BATCHES, loss=functional.cross_entropy)
        kept = [model[int(n)].weight != 0 for n in LAYERS]
        assert [k.flatten().int().tolist() for k in kept] == want and sum(r.kept for r in report.layers) == 8
        with pytest.raises(CalibrationError, match="pass data="):
            gossamer.prune(toy(), method, density=0.3)
    model = net()
    gossamer.prune(model, "snip", pattern="2:4", data=batch(0), loss=functional.mse_loss)
    assert all(((model[i].weight != 0).view(-1, 4).sum(1) == 2).all() for i in (0, 2))


def test_only_the_densities_are_taken_as_an_allocation():
    shown = {"data": batch(0), "loss": functional.mse_loss}
    want = {r.name: r.kept for r in gossamer.attach(net(), "snip", density=0.2, **shown).report()}
    handle = gossamer.attach(net(), "static", density=0.2, allocation="snip", **shown)
    assert {r.name: r.kept for r in handle.report()} == want and want["0"] / 288 != pytest.approx(want["2"] / 192, 0.05)
    other = gossamer.attach(net(), "static", density=0.2, allocation="snip", seed=1, **shown)
    assert handle.supports()["0"] != other.supports()["0"]
    model = net()
    gossamer.prune(model, "random", density=0.2, allocation="global_magnitude")
    kept = gossamer.attach(net(), "global_magnitude", density=0.2).report()
    assert [int((model[int(r.name)].weight != 0).sum()) for r in kept] == [r.kept for r in kept]
    model = net()
    gossamer.prune(model, "random", density=0.2, allocation="snip", **shown)
    assert {n: int((model[int(n)].weight != 0).sum()) for n in SIZES} == want
    with pytest.raises(CalibrationError, match="pass data="):
        gossamer.prune(net(), "random", density=0.2, allocation="snip")
    with pytest.raises(TargetError, match="no allocation"):
        gossamer.attach(net(), "static", density=0.2, allocation="rigl")
    with pytest.raises(CalibrationError, match="pass data="):
        gossamer.attach(net(), "static", density=0.2, allocation="snip")
    with pytest.raises(TargetError, match="no allocation"):
        gossamer.attach(net(), "static", density=0.2, allocation="magnitude")
    with pytest.raises(UnknownName, match="'snip'"):
        gossamer.attach(net(), "static", density=0.2, allocation="snp")


def test_supports_may_move_on_from_where_snip_began():
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    shown = {"data": batch(0), "loss": functional.mse_loss}
    start = gossamer.attach(net(), "snip", density=0.2, **shown).supports()
    moves = get_method("rigl")(density=0.2, total_steps=20, every=2).policy
    handle = gossamer.attach(model, replace(get_method("snip")(density=0.2), policy=moves), optimizer=opt, **shown)
    assert all(handle.supports()[n] == start[n] for n in start)
    for t in range(2):
        functional.mse_loss(model(batch(t)[0]), batch(t)[1]).backward()
        opt.step()
        handle.step()
    assert any(handle.supports()[n] != start[n] for n in start) and handle.report().sad > 0


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_what_cannot_be_is_refused_in_words():
    pair, mse = (torch.randn(3, 4), torch.randn(3, 4)), functional.mse_loss
    line = lambda: nn.Sequential(nn.Linear(4, 4))
    for data, loss, match in [
        (None, mse, r"pass data="),
        ([], mse, "no batch was given"),
        (7, mse, "got int"),
        ([torch.randn(3, 4)], mse, r"a pair \(inputs, target\)"),
        (pair, None, "scalar that depends on the weights|temperature=1"),
        (pair, lambda out, y: out - y, r"shape \(3, 4\)"),
        ((torch.randn(3, 5), pair[1]), mse, "failed on the data"),
    ]:
        for method in ("snip", "grasp"):
            model = line()
            with pytest.raises(CalibrationError, match=match):
                gossamer.attach(model, method, density=0.5, data=data, loss=loss)
            assert set(model.state_dict()) == {"0.weight", "0.bias"}
    for method in ("snip", "grasp", "synflow"):
        with pytest.raises(CalibrationError, match=r"no gradient reached 1 layers \(spare\)"):
            gossamer.attach(Unused(), method, density=0.5, data=pair, loss=mse)
        with pytest.raises(BudgetError, match="above 0 and up to 1"):
            gossamer.attach(line(), method, density=0.0, data=pair, loss=mse)
        with pytest.raises(TargetError, match="does not own"):
            foreign = torch.optim.SGD(line().parameters(), lr=0.1)
            gossamer.attach(line(), method, density=0.5, data=pair, loss=mse, optimizer=foreign)
        model = line()
        gossamer.attach(model, method, density=0.5, data=pair, loss=mse)
        with pytest.raises(TargetError, match="still carries a mask"):
            gossamer.attach(model, method, density=0.5, data=pair, loss=mse)
    with pytest.raises(NonFiniteError, match="gradient of layer '0'"):
        gossamer.attach(line(), "snip", density=0.5, data=pair, loss=lambda out, y: mse(out, y) * math.inf)
    with pytest.raises(BudgetError, match="rounds=0"):
        get_method("synflow")(rounds=0)
    with pytest.raises(BudgetError, match="2 rounds of falling density"):
        gossamer.attach(line(), "snip", pattern="2:4", rounds=2, data=pair, loss=mse)
    with pytest.raises(PatternError, match="in every pool"):
        get_method("synflow")(pattern=pattern("2:4"))
    with pytest.raises(BudgetError, match="temperature"):
        get_method("grasp")(temperature=0.0)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_a_model_may_be_one_layer(method):
    torch.manual_seed(0)
    shown = {"data": (torch.randn(5, 6), torch.randn(5, 4)), "loss": functional.mse_loss}
    assert gossamer.attach(nn.Linear(6, 4), method, density=0.5, **shown).density == 0.5


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x)


def test_whole_numbers_that_a_model_keeps_are_left_as_they_were():
    model = Counting()
    gossamer.attach(model, "synflow", density=0.5, data=torch.ones(1, 4))
    assert model.calls == 0
