"""Cut: bits joined by AND give what `where` gives, in every type, layout and order of the gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from gossamer.core.cut import add_where_, cut, cut_, faded, learned

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32)
LAYOUTS = {
    "as it is": lambda x: x,
    "turned": lambda x: x.mT if x.dim() > 1 else x,
    "every other": lambda x: x[..., ::2],
}
ODD = (math.nan, math.inf, -math.inf, -0.0, 1e-45)


def drawn(shape, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=draw)
    places = torch.randint(len(ODD) + 3, w.shape, generator=draw)
    for n, odd in enumerate(ODD):
        w[places == n] = odd
    w = w.nan_to_num() if dtype is torch.int32 else w
    return w.to(dtype), torch.rand(shape, generator=draw) < 0.5


def same(a, b):
    """Equal bit for bit, NaNs and the signs of zeros too."""
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype is b.dtype and torch.equal(a.contiguous().view(word), b.contiguous().view(word))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from(tuple(LAYOUTS)),
    st.integers(0, 99),
)
def test_what_is_kept_stays_bit_for_bit_and_the_rest_is_plus_zero(shape, dtype, layout, seed):
    whole, kept = drawn(shape, dtype, seed)
    other, version = drawn(shape, dtype, seed + 100)[0], whole._version
    w, kept, other = (LAYOUTS[layout](x) for x in (whole, kept, other))
    want = torch.where(kept, w, torch.zeros((), dtype=dtype))
    assert same(cut(w, kept), want)
    if dtype.is_floating_point:
        assert same(faded(w, kept, 0.25), torch.where(kept, w, w * 0.25))
        added = torch.where(kept, other + 0.25 * w, other)
        torch.testing.assert_close(add_where_(other.clone(), w, kept, 0.25), added, equal_nan=True)
    assert cut_(w, kept) is w and same(w, want) and whole._version > version  # autograd sees the write


def test_a_mask_that_broadcasts():
    w = torch.randn(3, 4)
    kept = torch.tensor([True, False, True, False])
    assert torch.equal(cut(w, kept), w * kept) and torch.equal(cut_(w.clone(), kept), w * kept)


def test_gradients_of_any_order():
    w, kept = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4) < 0.5
    assert torch.autograd.gradcheck(lambda x: cut(x, kept), w)
    assert torch.autograd.gradgradcheck(lambda x: cut(x, kept) ** 3, w)
    (by_w,) = torch.autograd.grad(learned(w, kept).pow(3).sum(), w, create_graph=True)
    assert torch.equal(by_w, torch.where(kept, 3 * w**2, 0))
    assert torch.equal(torch.autograd.grad(by_w.sum(), w)[0], torch.where(kept, 6 * w, 0))


def test_function_transforms_and_forward_mode():
    w, kept, x_BI = torch.randn(3, 4, requires_grad=True), torch.rand(3, 4) < 0.5, torch.randn(5, 4)
    zero = torch.zeros(())
    value = lambda w, x_I: (cut(w, kept) @ x_I).square().sum()
    want = lambda w, x_I: (torch.where(kept, w, zero) @ x_I).square().sum()
    torch.testing.assert_close(grad(value)(w.detach(), x_BI[0]), grad(want)(w.detach(), x_BI[0]))
    torch.testing.assert_close(vmap(lambda x: value(w, x))(x_BI), vmap(lambda x: want(w, x))(x_BI))
    along = ((w.detach(), x_BI[0]), (torch.ones(3, 4), torch.ones(4)))
    torch.testing.assert_close(jvp(value, *along), jvp(want, *along))
    with dual_level():
        turned = cut(make_dual(w.detach(), torch.ones(3, 4)), kept)
        assert torch.equal(unpack_dual(turned).tangent, kept.float())


@pytest.mark.parametrize("kind", ["compile", "trace"])
def test_tracers_see_a_plain_operator(kind):
    w, kept = torch.randn(3, 4, requires_grad=True), torch.rand(3, 4) < 0.5
    if kind == "compile":
        fast = torch.compile(cut, backend="aot_eager", fullgraph=True)
    else:
        fast = torch.jit.trace(lambda w, kept: cut(w, kept), (w, kept))
    assert torch.equal(fast(w, kept), torch.where(kept, w, torch.zeros(())))


def test_no_kernel_writes_what_is_written_down_faked_or_mapped():
    import gossamer.attach  # noqa: F401, whose kernels serve tensors of this size

    w, kept = torch.randn(256, 256), torch.rand(256, 256) < 0.5
    want = torch.where(kept, w, torch.zeros(()))
    graph = make_fx(lambda x: x * cut(w, kept))(torch.ones(()))
    torch.full_like(w, math.nan)  # what memory that nobody wrote to may hold
    assert torch.equal(graph(torch.ones(())), want)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert cut(w, kept).shape == w.shape
    both = vmap(lambda kept: cut(w, kept))(torch.stack([kept, ~kept]))
    assert torch.equal(both[0], want) and torch.equal(both[1], w - want)
