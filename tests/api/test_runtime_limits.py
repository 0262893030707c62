"""compile where models are unusual: each gives the model's own numbers, or an error that says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import gossamer
from gossamer.core.errors import GossamerError
from gossamer.runtime import compiled
from gossamer.runtime.capture import CaptureError

CLOSE = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}


class Does(nn.Module):
    """A model that calls a function with itself and its inputs."""

    def __init__(self, does: Callable, **parts: object) -> None:
        super().__init__()
        self.does = does
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.does(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def heads(x: torch.Tensor, count: int = 4) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def attend(m, x, mask=None, add=None, out=lambda y, x: y.transpose(1, 2).reshape(x.shape)):
    q, k, v = (part(x) if add is None else part(x) + add for part in (m.q, m.k, m.v))
    return out(functional.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=mask), x)


def projections() -> dict[str, nn.Module]:
    return {name: nn.Linear(16, 16) for name in "qkv"}


def turned(m, x):
    """Heads turned by angles that differ between the halves of a head, or between heads."""
    q = heads(m.layer(x), 2)
    d, cos, sin = q.shape[3] // 2, *(t[..., : x.shape[1], :] for t in (m.angles.cos(), m.angles.sin()))
    q = q * cos + torch.cat([-q[..., d:], q[..., :d]], -1) * sin
    return q.transpose(1, 2).reshape(x.shape)


def half_turned(m, x):
    """A rotary turn with half its sines."""
    q = heads(m.layer(x), 2)
    d, cos, sin = q.shape[3] // 2, *(t[..., : x.shape[1], :] for t in (m.angles.cos(), m.angles.sin()))
    q = torch.add(q * cos, torch.cat([-q[..., d:], q[..., :d]], -1) * sin, alpha=0.5)
    return q.transpose(1, 2).reshape(x.shape)


def same_padding(m, x):
    """Padding that depends on the image's size."""
    high, wide = (max((-(-size // 2) - 1) * 2 + 3 - size, 0) for size in x.shape[-2:])
    return m.layer(functional.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


def flat_residual(m, x):
    y = x.flatten(0, 1)
    return m.norm(y + m.layer(y)).view(x.shape)


def learned_queries(m, x):
    q = heads(m.latents.expand(x.shape[0], -1, -1))
    y = functional.scaled_dot_product_attention(q, heads(m.k(x)), heads(m.v(x)))
    return y.transpose(1, 2).reshape(x.shape[0], -1, 16)


def bare_rms(m, x, keep: bool = True):
    y = m.layer(x)
    return m.gamma * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=keep) + 1e-5))


def almost_gelu(x):
    """The tanh form of GELU, but for a factor in its inner sum."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * torch.add(x, 0.044715 * torch.pow(x, 3.0), alpha=4)))


def rows(*shape: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(shape),)


# (model, calls): compiled on the first call and compared on all.
MODELS: dict[str, Callable[[], tuple[nn.Module, list[tuple]]]] = {
    "batch norm over positions": lambda: (
        Does(lambda m, x: m.norm(m.layer(x)), layer=nn.Linear(8, 6), norm=_norm(5)),
        [rows(2, 5, 8), rows(3, 5, 8)],
    ),
    "batch norm with a computed scale": lambda: (
        Does(
            lambda m, x: functional.batch_norm(m.layer(x), m.mean, m.var, m.gamma * 2, m.gamma + 1),
            layer=nn.Conv2d(3, 4, 1), gamma=parameter(4), mean=torch.randn(4), var=torch.rand(4) + 0.5,
        ),
        [rows(2, 3, 5, 5)],
    ),
    "layer norm with a computed shift": lambda: (
        Does(
            lambda m, x: functional.layer_norm(m.layer(x), (8,), m.gamma, m.gamma * 3),
            layer=nn.Linear(8, 8), gamma=parameter(8),
        ),
        [rows(3, 4, 8), rows(2, 7, 8)],
    ),
    "RMS norm over the wrong axis": lambda: (
        Does(lambda m, x: bare_rms(m, x, keep=False), layer=nn.Linear(8, 8), gamma=parameter(8)), [rows(8, 8)],
    ),
    "RMS norm with a multiple of eps": lambda: (
        Does(
            lambda m, x: m.gamma * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.5, alpha=3))),
            gamma=parameter(8),
        ),
        [rows(2, 4, 8)],
    ),
    "GELU that is none": lambda: (
        Does(lambda m, x: almost_gelu(m.layer(x)), layer=nn.Linear(8, 8)), [rows(2, 4, 8), rows(3, 5, 8)],
    ),
    "RMS norm with one factor": lambda: (
        Does(bare_rms, layer=nn.Linear(8, 8), gamma=parameter(1)), [rows(2, 4, 8), rows(3, 5, 8)],
    ),
    "padding by the image's size": lambda: (
        Does(same_padding, layer=nn.Conv2d(3, 4, 3, 2)), [rows(1, 3, 16, 16), rows(2, 3, 17, 20)],
    ),
    "heads that stay apart": lambda: (
        Does(lambda m, x: attend(m, x, out=lambda y, x: y.transpose(1, 2).reshape(-1, 4, 4)), **projections()),
        [rows(2, 6, 16), rows(3, 5, 16)],
    ),
    "heads turned twice": lambda: (
        Does(lambda m, x: attend(m, x, out=lambda y, x: y.transpose(1, 2).transpose(1, 2).flatten(2)), **projections()),
        [rows(2, 6, 16), rows(3, 5, 16)],
    ),
    "one sum in queries, keys and values": lambda: (
        Does(lambda m, x, add: attend(m, x, add=add), **projections()),
        [rows(2, 6, 16) * 2, rows(3, 5, 16) * 2],
    ),
    "learned queries": lambda: (
        Does(learned_queries, latents=parameter(1, 6, 16), **projections()), [rows(2, 6, 16), rows(3, 6, 16)],
    ),
    "a mask that was one for all queries": lambda: (
        Does(attend, **projections()),
        [(*rows(2, 6, 16), torch.randn(2, 1, 1, 6).expand(2, 1, 6, 6)), (*rows(2, 6, 16), torch.randn(2, 1, 6, 6))],
    ),
    "angles that differ between halves": lambda: (
        Does(turned, layer=nn.Linear(16, 16), angles=torch.rand(1, 1, 64, 8)), [rows(2, 6, 16), rows(3, 9, 16)],
    ),
    "half a turn": lambda: (
        Does(half_turned, layer=nn.Linear(16, 16), angles=torch.rand(1, 1, 64, 4).repeat(1, 1, 1, 2)),
        [rows(2, 6, 16), rows(3, 9, 16)],
    ),
    "angles that differ between heads": lambda: (
        Does(turned, layer=nn.Linear(16, 16), angles=torch.rand(1, 2, 9, 8)), [rows(2, 6, 16), rows(3, 9, 16)],
    ),
    "a residual of flat rows": lambda: (
        Does(flat_residual, layer=nn.Linear(16, 16), norm=nn.LayerNorm(16)), [rows(2, 6, 16), rows(3, 5, 16)],
    ),
    "a mean over everything": lambda: (
        Does(lambda m, x: m.layer(x).mean(dim=None, keepdim=True), layer=nn.Conv2d(3, 4, 1)), [rows(2, 3, 4, 4)],
    ),
    "clamped integers": lambda: (
        Does(lambda m, x: m.layer(x.clamp(0.0, 6.0)), layer=nn.Linear(8, 8)), [(torch.randint(-5, 9, (4, 8)),)],
    ),
    "minus infinity comes out": lambda: (
        Does(
            lambda m, x: m.layer(x).masked_fill(m.hidden, -torch.inf),
            layer=nn.Linear(8, 8), hidden=torch.arange(8) > 5,
        ),
        [rows(2, 8)],
    ),
    "a number is read from the input": lambda: (
        Does(lambda m, x: m.layer(x) * x.max().item(), layer=nn.Linear(8, 8)), [rows(2, 8), rows(2, 8)],
    ),
    "recurrent layers": lambda: (
        Does(lambda m, x: m.after(m.layer(x))[0], layer=nn.Linear(8, 8), after=nn.LSTM(8, 8, batch_first=True)),
        [rows(2, 5, 8), rows(3, 5, 8)],
    ),
    "decoder layers": lambda: (
        nn.TransformerDecoderLayer(16, 4, 32, batch_first=True),
        [(*rows(2, 5, 16), *rows(2, 7, 16)), (*rows(3, 7, 16), *rows(3, 2, 16))],
    ),
    "double precision": lambda: (
        Does(lambda m, x: functional.relu(m.layer(x)) + x, layer=nn.Linear(8, 8)).double(),
        [(torch.randn(2, 8, dtype=torch.float64),)],
    ),
}  # fmt: skip


def _norm(features: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(features)
    norm.running_mean.normal_()
    return norm


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_unusual_models_give_their_own_numbers(name: str) -> None:
    torch.manual_seed(0)
    model, calls = MODELS[name]()
    fast = gossamer.compile(model.eval(), calls[0])
    for args in calls:
        torch.testing.assert_close(fast(*args), model(*args), **CLOSE)


def plain(does: Callable = lambda m, x: m.layer(x), **parts: object) -> nn.Module:
    torch.manual_seed(0)
    return Does(does, layer=nn.Linear(8, 8), **parts).eval()


REFUSED = {
    "random": (lambda m, x: m.layer(x) + torch.rand(8), "draws random numbers"),
    "dropout that stays on": (lambda m, x: functional.dropout(m.layer(x), 0.5, True), "draws random numbers"),
    "values decide sizes": (lambda m, x: m.layer(x[x.sum(-1) > 0]), "size depends on values"),
    "values decide the way": (
        lambda m, x: torch.cond(x.sum() > 0, lambda y: m.layer(y), lambda y: y * 2.0, (x,)),
        "choice between graphs",
    ),
    "counts its calls": (lambda m, x: m.layer(x) * m.calls.add_(1), "writes its buffer 'model.calls'"),
    "writes its input": (lambda m, x: m.layer(x.add_(1)), "writes its input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plan_can_do_is_refused(name: str) -> None:
    does, reason = REFUSED[name]
    with pytest.raises(CaptureError, match=reason):
        gossamer.compile(plain(does, calls=torch.zeros(1)), torch.randn(20, 8))


def test_a_model_elsewhere_or_without_tensors_is_refused() -> None:
    with pytest.raises(GossamerError, match=r"layer\.weight is on meta"):
        gossamer.compile(plain().to("meta"), torch.randn(2, 8))
    with pytest.raises(CaptureError, match="holds no tensor"):
        gossamer.compile(plain(lambda m: m.layer(m.x), x=torch.randn(2, 8)), ())


DECISIONS = {
    "longer than three": (lambda m, x: m.layer(x) + 1 if x.shape[1] >= 4 else m.layer(x), 3),
    "even": (lambda m, x: m.layer(x) + 1 if x.shape[1] % 2 == 0 else m.layer(x), 5),
}


@pytest.mark.parametrize("name", DECISIONS)
@torch.no_grad()
def test_sizes_that_took_another_way_are_refused(name: str) -> None:
    does, other = DECISIONS[name]
    model = plain(does)
    fast = gossamer.compile(model, torch.randn(2, 6, 8))
    x = torch.randn(3, 8, 8)
    torch.testing.assert_close(fast(x), model(x), **CLOSE)
    with pytest.raises(GossamerError, match="compile it for this one"):
        fast(torch.randn(2, other, 8))
    with pytest.raises(GossamerError, match="compile it for this one"):
        fast.explain(torch.randn(2, other, 8))


def padded(m, x):
    return m.layer(functional.pad(x, (0, 0, 0, 1)) if x.shape[1] % 2 else x)


# What a length of 5 leaves open: the model's way for others, and where it takes another one.
NOT_TAKEN = {
    "odd lengths are padded": (padded, (7, 6, 4, 6, 5), 1),
    "eight is special": (lambda m, x: m.layer(x) + 1 if x.shape[1] == 8 else m.layer(x), (7, 8, 6, 8), 1),
    "two are special": (lambda m, x: m.layer(x) * (1 + (x.shape[1] in (8, 9))), (9, 7, 8), 2),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
@torch.no_grad()
def test_a_way_that_was_not_taken_is_followed_when_it_is(name: str) -> None:
    does, lengths, ways = NOT_TAKEN[name]
    model = plain(does)
    fast = gossamer.compile(model, torch.randn(2, 5, 8))
    for length in lengths:
        x = torch.randn(3, length, 8)
        torch.testing.assert_close(fast(x), model(x), **CLOSE)
    assert len(fast._ways) == ways and "steps" in fast.explain(torch.randn(3, lengths[1], 8))


@torch.no_grad()
def test_ways_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "MOST_WAYS", 0)
    fast = gossamer.compile(plain(padded), torch.randn(2, 5, 8))
    with pytest.raises(GossamerError, match="compile it for this one"):
        fast(torch.randn(2, 6, 8))


@torch.no_grad()
def test_a_batch_of_one_that_is_special_is_followed_as_it_is() -> None:
    model = plain(lambda m, x: m.layer(x) + 1 if x.shape[0] * x.shape[1] == 5 else m.layer(x))
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(gossamer.compile(model, x)(x), model(x), **CLOSE)


def test_an_image_smaller_than_the_window_is_refused() -> None:
    fast = gossamer.compile(nn.Conv2d(3, 4, 5).eval(), torch.randn(2, 3, 16, 16))
    with pytest.raises(GossamerError, match="compile it for this one"):
        fast(torch.randn(2, 3, 3, 3))


def test_outputs_are_memory_of_their_own() -> None:
    model = plain(lambda m, x: (m.layer(x), x, x.clone().view(-1), m.weight, m.weight * 2), weight=parameter(3))
    fast = gossamer.compile(model, torch.randn(2, 8))
    x = torch.randn(2, 8)
    kept, want = x.clone(), [t.clone() for t in fast(x)]
    with torch.no_grad():
        for out in fast(x):
            out.fill_(torch.nan)  # inference tensors would refuse
    assert torch.equal(x, kept)
    assert all(torch.equal(a, b) for a, b in zip(fast(x), want))
    nn.Linear(8, 2)(fast(x)[0]).sum().backward()  # a frozen network before one that learns


@torch.no_grad()
def test_keywords_in_any_order_and_nested_outputs() -> None:
    model = plain(lambda m, a, b: {"sum": (m.layer(a) - b, None, a.shape[0], "kind"), "none": []})
    fast = gossamer.compile(model, {"a": torch.randn(2, 8), "b": torch.randn(2, 8)})
    call = {"b": torch.randn(3, 8), "a": torch.randn(3, 8)}
    got, want = pytree.tree_flatten(fast(**call)), pytree.tree_flatten(model(**call))
    assert got[1] == want[1] and got[0][1:] == want[0][1:]
    torch.testing.assert_close(got[0][0], want[0][0], **CLOSE)


def test_modes_are_left_as_they_are_and_copies_work() -> None:
    model = plain(lambda m, x: m.drop(m.layer(x)), drop=nn.Dropout(0.5))
    model.drop.train()
    x = torch.randn(2, 8)
    fast = gossamer.compile(model, x)
    assert model.drop.training and not model.layer.training
    torch.testing.assert_close(copy.deepcopy(fast)(x), model.eval()(x), **CLOSE)
    with pytest.raises(GossamerError, match="save the packed model"):
        fast.__reduce_ex__(2)


def test_plans_at_rest_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "MOST_SHAPES", 3)
    fast = gossamer.compile(plain(lambda m, x: torch.relu(m.layer(x))), torch.randn(2, 8))
    for size in (5, 6, 7, 5, 8, 5, 9, 5):
        fast(torch.randn(size, 8))
    assert len(fast._shelf) == 3
    assert fast._shelf.take((torch.get_num_threads(), ((torch.Size([5, 8]), (False, False)),))) is not None


def test_layers_that_share_a_weight_share_its_forms() -> None:
    layer = nn.Linear(64, 64)
    once, twice = (gossamer.compile(nn.Sequential(*[layer] * n).eval(), torch.randn(40, 64)) for n in (1, 2))
    assert len(twice._weights) == len(once._weights) == 1


def test_a_norm_of_torchs_own_runs_in_panels() -> None:
    model = plain(lambda m, x: m.layer(m.norm(m.layer(x))), norm=nn.RMSNorm(8))
    model.norm.weight.data.normal_()
    x = torch.randn(2, 4, 8)
    fast = gossamer.compile(model, x)
    torch.testing.assert_close(fast(x), model(x), **CLOSE)
    assert "RMS norm" in fast.explain(x)
