"""Training sparse weights: products, gradients, layers and optimizers against their dense twins."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from gossamer.core.errors import BudgetError, FormatError
from gossamer.core.support import Support
from gossamer.formats import CSR, RowGrouped
from gossamer.kernels import ops, training
from gossamer.kernels.cpu import sddmm
from gossamer.kernels.cpu.sddmm import sampled_product
from gossamer.kernels.cpu.tokens import rows_to_panels
from gossamer.kernels.lowering import lower
from gossamer.kernels.ops import sparse_linear
from gossamer.kernels.reference import activate
from gossamer.nn import Move, SparseLinear, carry

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# (rows, columns, tokens, density, rows of a group): odd everywhere, one row, one column, empty, full, many panels.
CASES = [
    (13, 20, 5, 0.3, 1),
    (1, 33, 17, 0.5, 1),
    (40, 1, 64, 0.5, 1),
    (64, 100, 128, 0.1, 1),
    (31, 3000, 70, 0.02, 1),
    (9, 70_000, 3, 0.001, 1),
    (7, 11, 65, 1.0, 1),
    (7, 11, 65, 0.0, 1),
    (13, 21, 70, 0.3, 2),
    (13, 20, 33, 0.3, 4),
    (17, 300, 65, 0.1, 8),
]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request, monkeypatch):
    # Small shapes must reach the second thread, too.
    monkeypatch.setattr("gossamer.kernels.cpu.sddmm.GRAIN", 1)
    monkeypatch.setattr("gossamer.kernels.cpu.tokens.GRAIN", 1)
    monkeypatch.setattr("gossamer.kernels.cpu.spmm_panels.GRAIN", 1)
    before, laid_out = torch.get_num_threads(), (sddmm.plan_sampled, training._to_panels, training._to_rows)
    torch.set_num_threads(request.param)
    for plans in laid_out:
        plans.cache_clear()
    yield request.param
    torch.set_num_threads(before)
    for plans in laid_out:
        plans.cache_clear()


def example(rows, cols, tokens, density, g, seed=0):
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(-(-rows // g), cols, generator=rng) < density).repeat_interleave(g, 0)[:rows]
    w = torch.randn(rows, cols, generator=rng).where(mask, torch.zeros(()))
    fmt = CSR.from_dense(w, mask) if g == 1 else RowGrouped.from_dense(w, mask, g=g)
    return fmt, w, torch.randn(tokens, cols, generator=rng), torch.randn(tokens, rows, generator=rng)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sampled_product_is_the_dense_one_at_the_kept_entries(case, threads):
    fmt, _, x, dy = example(*case)
    got = sampled_product(lower(fmt), dy, x)
    torch.testing.assert_close(got, fmt.gather(dy.t() @ x).view(got.shape), **CLOSE)


def test_sampled_product_reads_and_writes_nothing_beyond(threads):
    fmt, _, x, dy = example(13, 20, 37, 0.3, 1)

    def guarded(t):
        room = torch.full((t.numel() + 64,), torch.nan)
        room[32 : 32 + t.numel()] = t.reshape(-1)
        return room, room[32 : 32 + t.numel()].view(t.shape)

    stream, want = lower(fmt), fmt.gather(dy.t() @ x)
    room, out = guarded(torch.zeros(want.numel(), 1))
    sampled_product(stream, guarded(dy)[1], guarded(x)[1], out)
    torch.testing.assert_close(out[:, 0], want, **CLOSE)
    assert room[:32].isnan().all() and room[32 + want.numel() :].isnan().all()
    with pytest.raises(FormatError, match=r"x must be .* \[37, 20\]"):
        sampled_product(stream, dy, x[:, :19].contiguous())


def test_sampled_product_takes_panels(threads):
    fmt, _, x, dy = example(16, 20, 70, 0.3, 4)
    panels = rows_to_panels(dy), rows_to_panels(x)
    want = sampled_product(lower(fmt), dy, x)
    torch.testing.assert_close(sampled_product(lower(fmt), *panels, tokens=70), want)
    torch.testing.assert_close(sampled_product(lower(fmt), *panels), want)


def test_results_do_not_depend_on_threads():
    fmt, _, x, dy = example(64, 3000, 200, 0.05, 1)
    before, seen = torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        seen.append(sampled_product(lower(fmt), dy, x))
    torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_dense_autograd(case, threads):
    fmt, w, x, dy = example(*case)
    fmt = fmt.with_parts({"values": fmt.values.clone().requires_grad_()})
    bias = torch.randn(case[0])
    ours = x.clone().requires_grad_(), bias.clone().requires_grad_()
    theirs = x.clone().requires_grad_(), bias.clone().requires_grad_(), w.clone().requires_grad_()
    sparse_linear(ours[0], fmt, ours[1], activation="silu").backward(dy)
    nn.functional.silu(linear(theirs[0], theirs[2], theirs[1])).backward(dy)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, **CLOSE)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, **CLOSE)
    torch.testing.assert_close(fmt.values.grad, fmt.gather(theirs[2].grad).view(fmt.values.shape), **CLOSE)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_rows_stored_in_another_order(activation, threads):
    rng = torch.Generator().manual_seed(2)
    order = torch.randperm(13, generator=rng)
    _, w, x, dy = example(13, 20, 70, 0.3, 4)
    w = torch.zeros_like(w).index_copy_(0, order, w)
    fmt = RowGrouped.from_dense(w, g=4, order=order)
    fmt = fmt.with_parts({"values": fmt.values.clone().requires_grad_()})
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    bias, dense = torch.randn(13, generator=rng), w.clone().requires_grad_()
    sparse_linear(ours, fmt, bias, activation=activation).backward(dy)
    activate(linear(theirs, dense, bias), activation).backward(dy)
    torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)
    torch.testing.assert_close(fmt.values.grad, fmt.gather(dense.grad).view(fmt.values.shape), **CLOSE)


def test_no_dense_weight_is_made(monkeypatch):
    monkeypatch.setattr(CSR, "to_dense", lambda self: pytest.fail("the weight was unpacked"))
    layer = SparseLinear(40, 30, density=0.1)
    x = torch.randn(2, 3, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.values.grad.shape == layer.values.shape


def test_memory_follows_what_is_kept():
    # 100 000 x 100 000 weights would be 40 GB; these 20 000 must fit where they are.
    layer = SparseLinear(100_000, 100_000, density=2e-6)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 100_000)).square().mean().backward()
    optimizer.step()
    assert layer.values.numel() == layer.values.grad.numel() == 20_000
    assert optimizer.state[layer.values]["exp_avg_sq"].shape == (20_000,)


@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_empty_rows_and_few_tokens(tokens, threads):
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[[1, 1, 7], [0, 11, 5]] = True
    layer = SparseLinear.from_support(mask)
    x = torch.randn(tokens, 12, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.values.grad, x.detach().sum(0)[[0, 11, 5]], **CLOSE)
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), **CLOSE)
    torch.testing.assert_close(layer.bias.grad, torch.full((9,), float(tokens)))


def test_nan_goes_only_where_it_should():
    fmt, w, x, dy = example(13, 20, 37, 0.3, 1)
    wiring, values = training.Wiring.of(fmt), fmt.values
    x[5, 3], dy[9, 2] = torch.nan, torch.inf
    dx, dvalues = training.gradients(wiring, values, dy, x, need_x=True, need_values=True)
    rows, cols = fmt.slots() // 20, fmt.slots() % 20
    assert torch.equal(~dvalues.isfinite(), (rows == 2) | (cols == 3))
    assert torch.equal(~dx.isfinite(), (torch.arange(37)[:, None] == 9) & (w[2] != 0))
    clean = sampled_product(wiring.forward, torch.ones(40, 13), torch.ones(40, 20))
    assert torch.equal(clean, torch.full_like(clean, 40.0)), "nothing stays behind for the next call"


def masked_twin(layer):
    dense, mask = layer.to_dense(), torch.zeros(layer.out_features * layer.in_features)
    mask[layer.positions()] = 1
    return dense, mask.view(layer.out_features, layer.in_features)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    ],
    ids=["sgd", "momentum", "adam", "fused adam", "adamw"],
)
def test_twenty_steps_are_those_of_masked_dense_training(make):
    torch.manual_seed(0)
    ours = nn.Sequential(SparseLinear(30, 50, density=0.1), nn.ReLU(), SparseLinear(50, 7, density=0.2))
    (first, mask1), (last, mask2) = masked_twin(ours[0]), masked_twin(ours[2])
    dense, masks = nn.Sequential(first, nn.ReLU(), last), {0: mask1, 2: mask2}
    steps = make(ours.parameters()), make(dense.parameters())
    for _ in range(20):
        x, y = torch.randn(33, 30), torch.randint(7, (33,))
        for net, optimizer in zip((ours, dense), steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            if net is dense:
                for k, mask in masks.items():
                    dense[k].weight.grad.mul_(mask)
            optimizer.step()
        for k in (0, 2):
            torch.testing.assert_close(ours[k].weight, dense[k].weight.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours[k].bias, dense[k].bias, rtol=1e-4, atol=1e-5)


def test_the_gradient_test_kills_a_planted_fault(monkeypatch):
    right = training.transposed
    monkeypatch.setattr(training, "transposed", lambda fmt: (right(fmt)[0], right(fmt)[1].roll(1)))
    with pytest.raises(AssertionError):
        test_twenty_steps_are_those_of_masked_dense_training(lambda p: torch.optim.SGD(p, lr=0.05))


def test_in_double_it_is_exact():
    layer = SparseLinear(6, 5, density=0.4).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    parts = [layer.indptr, layer.indices]
    like = layer.stored

    def run(x, values, bias):
        return sparse_linear(x, like.with_parts(dict(zip(CSR.PARTS, [*parts, values]))), bias)

    assert torch.autograd.gradcheck(run, (x, layer.values, layer.bias))


def test_threads_may_train_at_once():
    layers = [SparseLinear(200, 150, density=0.05) for _ in range(2)]
    xs = [torch.randn(70, 200) for _ in layers]
    wrong = []

    def work(which):
        for _ in range(30):
            layer = layers[which % 2]
            x = xs[which % 2].clone().requires_grad_()
            y = layer(x)
            (dv,) = torch.autograd.grad(y.sum(), layer.values, retain_graph=True)
            (dx,) = torch.autograd.grad(y.sum(), x)
            columns = layer.positions() % 200
            ok = torch.allclose(dv, x.detach().sum(0)[columns], **CLOSE)
            if not (ok and torch.allclose(dx, layer.weight.sum(0).expand_as(dx), **CLOSE)):
                wrong.append(which)

    crew = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in crew], [t.join() for t in crew]
    assert not wrong


def test_compiles_into_one_graph_and_refuses_second_derivatives():
    layer = SparseLinear(20, 13, density=0.3)
    x = torch.randn(4, 20, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    got, layer.values.grad = layer.values.grad, None
    layer(x.detach()).square().sum().backward()
    torch.testing.assert_close(got, layer.values.grad)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dx.sum().backward()


def test_from_dense_and_back():
    dense = nn.Linear(20, 13)
    mask = torch.rand(13, 20) < 0.3
    layer = SparseLinear.from_dense(dense, Support(mask))
    assert torch.equal(layer.weight, dense.weight.where(mask, torch.zeros(())))
    assert torch.equal(layer.to_dense().bias, dense.bias) and layer.density == int(mask.sum()) / 260
    assert torch.equal(SparseLinear.from_dense(layer.to_dense()).positions(), layer.positions())
    x = torch.randn(2, 5, 20)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_autocast_computes_in_float32_and_half_is_refused():
    layer = SparseLinear(20, 13, density=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 20).bfloat16()).dtype is torch.float32
    with pytest.raises(FormatError, match="computes in float32"):
        copy.deepcopy(layer).bfloat16()(torch.randn(3, 20).bfloat16())
    with pytest.raises(FormatError, match="call"):
        SparseLinear.from_dense(nn.Linear(3, 3).half())


def test_a_random_support_has_an_exact_count():
    for density in (0, 0.001, 0.2, 0.5, 1):
        layer = SparseLinear(40, 50, density=density, generator=torch.Generator().manual_seed(1))
        assert layer.positions().unique().numel() == layer.values.numel() == round(density * 2000)
    with pytest.raises(BudgetError, match="one of them"):
        SparseLinear(4, 5)
    with pytest.raises(BudgetError, match=r"0\.\.1"):
        SparseLinear(4, 5, density=1.5)


def test_supports_that_do_not_fit_are_refused():
    layer = SparseLinear(20, 13, density=0.3)
    for wrong, why in (
        (torch.ones(20, 13, dtype=torch.bool), "mask"),
        (torch.tensor([0, 260]), "places must lie"),
        (torch.tensor([-1]), "places must lie"),
        (torch.tensor([3, 3]), "once"),
        (torch.tensor([0.5]), "flat int64"),
    ):
        with pytest.raises(FormatError, match=why):
            layer.set_support(wrong)


def test_drop_and_grow_carries_values_and_moments():
    torch.manual_seed(1)
    layer = SparseLinear(20, 13, density=0.2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, fused=True)

    def step():
        optimizer.zero_grad()
        layer(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    moment = torch.zeros(13 * 20)
    moment[layer.positions()] = optimizer.state[layer.values]["exp_avg"]
    before, weight = layer.positions(), layer.weight.clone().reshape(-1)
    free = torch.ones(13 * 20, dtype=torch.bool)
    free[before] = False
    after = torch.cat([before[5:], free.nonzero().squeeze(1)[:9]])
    param = layer.values
    move = layer.set_support(after, fresh_values=0.25)
    carry(optimizer, layer.values, move)
    assert (move.dropped, move.grown) == (5, 9) and layer.values is param
    kept = torch.isin(layer.positions(), before)
    assert torch.equal(layer.values[kept], weight[layer.positions()[kept]])
    assert (layer.values[~kept] == 0.25).all()
    state = optimizer.state[layer.values]
    assert torch.equal(state["exp_avg"], moment[layer.positions()]) and int(state["step"]) == 3
    # The next steps are right: kernels see the new support.
    step()
    layer(torch.ones(1, 20)).sum().backward()
    x = torch.randn(3, 20)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias), **CLOSE)
    with pytest.raises(FormatError, match="old support had"):
        Move(torch.tensor([0]), 2).apply(torch.zeros(3))


def test_state_round_trip_brings_its_support():
    one, other = SparseLinear(20, 13, density=0.3), SparseLinear(20, 13, density=0.1)
    x = torch.randn(4, 20)
    other(x).sum().backward()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.positions(), one.positions()) and torch.equal(other(x), one(x))
    assert torch.equal(copy.deepcopy(one)(x), one(x))
    broken = one.state_dict() | {"indices": torch.full_like(one.indices, 99)}
    with pytest.raises(FormatError, match="column indices"):
        other.load_state_dict(broken)


def test_training_keeps_no_layer_alive_and_plans_survive_steps():
    layer = SparseLinear(20, 13, density=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 20, requires_grad=True)
    plans = []
    for _ in range(3):
        layer(x).sum().backward()
        optimizer.step()
        plans.append(ops._PLANS[layer.values].plan)
    assert plans[0] is plans[2], "a step does not lay the work out again"
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias), **CLOSE)
    alive = weakref.ref(training._WIRINGS[layer.indices].wiring)
    del layer, optimizer, plans
    gc.collect()
    assert alive() is None


def test_opcheck():
    layer = SparseLinear(20, 13, density=0.3)
    parts = layer.indptr, layer.indices, layer.values, layer.bias, 20
    torch.library.opcheck(torch.ops.gossamer.csr_linear.default, (torch.randn(2, 3, 20, requires_grad=True), *parts))
    with pytest.raises(FormatError, match="takes 20 input features, got 19"):
        layer(torch.randn(3, 19))


def test_a_step_leaves_no_activations_behind():
    layer = SparseLinear(20, 13, density=0.3)
    gc.disable()
    try:
        x = (torch.randn(4, 20, requires_grad=True) * 1).relu()
        alive = weakref.ref(x)
        layer(x).sum().backward()
        del x
        assert alive() is None
    finally:
        gc.enable()


def test_a_step_allocates_nothing_of_the_weight_size():
    layer = SparseLinear(2000, 2000, density=0.01)
    x = torch.randn(16, 2000, requires_grad=True)
    layer(x).sum().backward()
    with torch.profiler.profile(profile_memory=True) as seen:
        layer(x).sum().backward()
    largest = max((event.cpu_memory_usage for event in seen.events()), default=0)
    assert 0 < largest < 2000 * 2000, "bytes of one allocation, a quarter of the dense weight"
