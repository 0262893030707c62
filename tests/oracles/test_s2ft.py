"""S2FT against autograd on the dense weight: the same output, the same gradient where it may learn, none elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer
from gossamer.core.errors import BudgetError, TargetError
from tests.oracles.adapters import OPTIONS, Block, batch, blocks, train

SIDES = ("inputs", "outputs")


def adapted(side: str, **more: object):
    model = blocks(torch.float64)
    return model, gossamer.adapt(model, "s2ft", density=0.2, side=side, targets=["*_proj"], **more)


@pytest.mark.parametrize("side", SIDES)
def test_output_and_gradients_are_those_of_the_dense_weight(side):
    """The naive twin: w with the change written in, and autograd's whole gradient, of which a slice is taken."""
    model, adapters = adapted(side)
    x = batch(model).requires_grad_()
    for delta in adapters.deltas("default").values():
        nn.init.normal_(delta.values)
    y = model(x)
    (y * x.detach()).sum().backward()
    weights = {at: layer.weight + delta.change(layer.weight) for (at, layer), delta in _pairs(adapters)}
    twins = {at: w.detach().requires_grad_() for at, w in weights.items()}
    z = x.detach().requires_grad_()
    expected = z
    for i in range(2):
        hidden = torch.relu(functional.linear(expected, twins[f"{i}.up_proj"], model[i].up_proj.bias))
        expected = expected + functional.linear(hidden, twins[f"{i}.down_proj"])
    (expected * z.detach()).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, z.grad)
    for (at, _), delta in _pairs(adapters):
        whole = twins[at].grad
        part = whole[:, delta.index] if side == "inputs" else whole[delta.index]
        torch.testing.assert_close(delta.values.grad, part)


def _pairs(adapters):
    deltas = adapters.deltas("default")
    return [((at, layer), deltas[at]) for at, layer in adapters.layers()]


@pytest.mark.parametrize("side", SIDES)
def test_only_what_was_chosen_moves(side):
    model, adapters = adapted(side)
    before = {n: p.clone() for n, p in model.named_parameters() if "deltas" not in n}
    train(model, adapters.parameters(), after=adapters.step)
    adapters.merge()
    for (at, layer), delta in _pairs(adapters):
        moved = layer.weight != before[f"{at}.weight"]
        allowed = torch.zeros_like(moved)
        allowed[(slice(None), delta.index) if side == "inputs" else delta.index] = True
        assert (moved == allowed).all() and 0 < allowed.float().mean() < 0.4
        assert layer.weight.grad is None


class Shapes(TorchDispatchMode):
    """The shape of every tensor that an operation makes; a view of one of its inputs is not made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
        self.seen |= {t.shape for t in made if t.untyped_storage().data_ptr() not in given}
        return out


@pytest.mark.parametrize(("method", "dense"), [("s2ft", False), ("lora", False), (None, True)])
def test_no_gradient_of_a_whole_weight_is_formed(method, dense):
    """Nor is anything else of the weight's shape; full training, which the last case runs, does form it."""
    model = blocks()
    if method:
        gossamer.adapt(model, method, targets=["*_proj"], **OPTIONS[method])
    with Shapes() as shapes:
        model(batch(model)).sum().backward()
    assert bool(shapes.seen & {torch.Size([16, 8]), torch.Size([8, 16])}) is dense


def test_whole_heads_are_chosen():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v_proj, self.o_proj = nn.Linear(24, 8), nn.Linear(24, 24)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.mlp = Attention(), Block(24)
            self.config = type("Config", (), {"hidden_size": 24, "num_attention_heads": 6, "head_dim": 4})()

    adapters = gossamer.adapt(Model(), "s2ft", density=0.3, targets=["*v_proj", "*o_proj", "*down_proj"])
    found = adapters.deltas("default")
    value, output, down = (found[n] for n in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"))
    # Grouped-query attention: 2 heads of values, 6 of queries; each side counts its own.
    assert value.side == "outputs" and len(value.index) == 4 and output.side == "inputs" and len(output.index) == 8
    assert (output.index.view(2, 4) == output.index.view(2, 4)[:, :1] + torch.arange(4)).all()
    assert not (output.index.view(2, 4)[:, 0] % 4).any() and len(down.index) == 14


def test_the_heaviest_channels_by_magnitude():
    model = blocks()
    with torch.no_grad():
        model[0].down_proj.weight[:, [3, 7]] = 9.0
    delta = gossamer.adapt(model, "s2ft", density=1 / 8, score="magnitude").deltas("default")["0.down_proj"]
    assert delta.index.tolist() == [3, 7]


def test_disjoint_adapters_fuse_by_addition():
    model, adapters = adapted("inputs")
    adapters.add("s2ft", name="b", density=0.2, side="inputs", targets=["*_proj"], seed=1)
    for name in ("default", "b"):
        adapters.use(name)
        train(model, adapters.parameters())
    one, two = adapters.deltas("default"), adapters.deltas("b")
    adapters.fuse("both", {"default": 1.0, "b": 0.5})
    for at, delta in adapters.deltas("both").items():
        w = model.get_submodule(at).weight
        assert len(delta.index) <= len(one[at].index) + len(two[at].index)
        torch.testing.assert_close(delta.change(w), one[at].change(w) + 0.5 * two[at].change(w))
    adapters.use("both")
    fused = model(batch(model))
    adapters.use({"default": 1.0, "b": 0.5})
    torch.testing.assert_close(model(batch(model)), fused)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"side": "rows"}, {"score": "hessian"}])
def test_bad_options(options):
    with pytest.raises(BudgetError, match="s2ft"):
        gossamer.adapt(blocks(), "s2ft", **options)


def test_heads_that_do_not_divide_and_models_without_the_usual_names():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"o_proj": nn.Linear(10, 10)})})
    with pytest.raises(TargetError, match="no multiple of a head's 4"):
        gossamer.adapt(model, "s2ft", heads=4)
    with pytest.raises(TargetError, match="name yours with targets"):
        gossamer.adapt(nn.Sequential(nn.Linear(4, 4)), "s2ft")
