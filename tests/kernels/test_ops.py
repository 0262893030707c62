"""The operators: opcheck, gradients against the dense twin, one node under compile and export."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from gossamer.core.errors import DispatchError, FormatError
from gossamer.formats import CSR, NM, Bitmask, Block, Dense, RowGrouped, TileBitmask
from gossamer.kernels import ops
from gossamer.kernels.ops import record, sparse_linear
from gossamer.kernels.reference import ACTIVATIONS, activate

BUILDS = {
    "dense": Dense.from_dense,
    "csr": CSR.from_dense,
    "bitmask": Bitmask.from_dense,
    "tilebitmask": TileBitmask.from_dense,
    "nm": NM.from_dense,
    "rows4": RowGrouped.from_dense,
    "block4x3": partial(Block.from_dense, a=4, b=3),
}


def example(name, dtype=torch.float32, rows=13, cols=20, lead=(2, 3)):
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(rows, cols, generator=rng, dtype=torch.float64)
    rank = torch.rand(rows, cols // 4, 4, generator=rng).argsort(-1).argsort(-1)
    w = torch.where((rank < 2).view(rows, cols), w, torch.zeros((), dtype=w.dtype)).to(dtype)
    x = torch.randn(*lead, cols, generator=rng, dtype=torch.float64).to(dtype)
    bias = torch.randn(rows, generator=rng, dtype=torch.float64).to(dtype)
    return BUILDS[name](w), w, x, bias


def wanting_gradients(fmt):
    return fmt.with_parts({"values": fmt.values.clone().requires_grad_()})


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "reference") for name in BUILDS), ("csr", "cpu"), ("dense", "")]
)
def test_opcheck(name, backend):
    fmt, _, x, bias = example(name)
    fmt = wanting_gradients(fmt)
    inputs = (
        x.requires_grad_(),
        list(fmt.parts().values()),
        record(fmt),
        bias.requires_grad_(),
        "gelu",
        backend,
        None,
    )
    torch.library.opcheck(torch.ops.gossamer.sparse_linear.default, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BUILDS)
def test_gradients_match_the_dense_twin(name, activation):
    fmt, w, x, bias = example(name)
    fmt, w = wanting_gradients(fmt), w.clone().requires_grad_()
    ours = (x.clone().requires_grad_(), bias.clone().requires_grad_())
    theirs = (x.clone().requires_grad_(), bias.clone().requires_grad_())
    y = sparse_linear(ours[0], fmt, ours[1], activation=activation)
    want = activate(linear(theirs[0], w, theirs[1]), activation)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    y.backward(seed)
    want.backward(seed)
    for got, expected in zip(ours, theirs):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-5)
    kept = w.detach() != 0
    spread = fmt.with_parts({"values": fmt.values.grad}).to_dense()
    torch.testing.assert_close(spread[kept], w.grad[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILDS)
def test_gradcheck_in_double(name):
    fmt, _, x, bias = example(name, torch.float64, rows=3, cols=4, lead=(2,))
    parts, at = list(fmt.parts().values()), list(fmt.parts()).index("values")

    def product(x, values, bias):
        given = [*parts[:at], values, *parts[at + 1 :]]
        return torch.ops.gossamer.sparse_linear(x, given, record(fmt), bias, "silu", "reference", None)

    # The read-ahead of a bitmask multiplies nothing, so its gradient is zero on both sides.
    inputs = [each.clone().requires_grad_() for each in (x, parts[at], bias)]
    assert torch.autograd.gradcheck(product, inputs)


def test_gradient_only_where_wanted():
    fmt, w, x, bias = example("csr")
    x.requires_grad_()
    sparse_linear(x, fmt, bias).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand_as(x))
    assert fmt.values.grad is None and bias.grad is None
    plain = sparse_linear(x.detach(), fmt, bias)
    assert not plain.requires_grad


def test_second_derivatives_are_refused_in_words():
    fmt, _, x, bias = example("csr")
    x.requires_grad_()
    (dx,) = torch.autograd.grad(sparse_linear(x, fmt, bias, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        dx.sum().backward()


def test_backward_inside_autocast_keeps_its_precision():
    fmt, w, x, bias = example("csr")
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sparse_linear(x, fmt, bias).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand_as(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BUILDS)
def test_compiles_into_one_graph(name):
    fmt, w, x, bias = example(name)
    compiled = torch.compile(
        lambda x: sparse_linear(x, fmt, bias, activation="relu") + 1, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), torch.relu(linear(x, w, bias)) + 1, rtol=1e-5, atol=1e-5)


def test_plans_are_kept_renewed_and_dropped():
    # oneDNN keeps a re-ordered copy of the values; the sparse product reads them where they are.
    for name, copies in (("dense", True), ("csr", False)):
        fmt, w, x, _ = example(name)
        sparse_linear(x, fmt)
        first = ops._PLANS[fmt.values].plan
        sparse_linear(x, fmt)
        assert ops._PLANS[fmt.values].plan is first
        fmt.values.mul_(2)
        torch.testing.assert_close(sparse_linear(x, fmt), 2 * linear(x, w), rtol=1e-5, atol=1e-5)
        assert (ops._PLANS[fmt.values].plan is not first) == copies
    fmt.indptr.sub_(0)
    sparse_linear(x, fmt)
    assert ops._PLANS[fmt.values].plan is not first
    alive = weakref.ref(ops._PLANS[fmt.values].plan)
    del fmt, first
    gc.collect()
    assert alive() is None, "a dropped weight keeps no plan"


def test_wrong_inputs_are_named():
    fmt, _, x, bias = example("csr")
    with pytest.raises(FormatError, match="takes 20 input features, got 19"):
        sparse_linear(x[..., :19], fmt, bias)
    with pytest.raises(FormatError, match="convert one"):
        sparse_linear(x.half(), fmt, bias)
    with pytest.raises(FormatError, match="got 2 tensors"):
        torch.ops.gossamer.sparse_linear(x, list(fmt.parts().values())[:2], record(fmt), None, "none", "", None)
    with pytest.raises(DispatchError, match="serves Dense"):
        sparse_linear(x, fmt, bias, backend="onednn")
    broken = fmt.with_parts({"indices": torch.full_like(fmt.indices, 999)})
    with pytest.raises(FormatError, match="column indices"):
        sparse_linear(x, broken)


def test_the_gradient_test_kills_a_planted_fault(monkeypatch):
    monkeypatch.setattr(Bitmask, "gather", lambda self, dense: dense.reshape(-1)[: self.values.numel()])
    with pytest.raises(AssertionError):
        test_gradients_match_the_dense_twin("bitmask", "none")
