"""Attention on token panels against torch in float64: odd lengths, masks, shared heads, NaN in every padding lane."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from token_panels import poisoned_like, to_panels, to_rows
from torch.nn.functional import scaled_dot_product_attention

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu import attention as module
from gossamer.kernels.cpu.attention import attention, plan_attention
from gossamer.kernels.cpu.tokens import empty_panels

ATOL = 5e-6


@pytest.fixture(autouse=True)
def wake_threads_for_any_work(monkeypatch):
    monkeypatch.setattr(module, "GRAIN", 1)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(batch, seq, heads, kv_heads, dim, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, seq, n * dim, generator=make) for n in (heads, kv_heads, kv_heads)]


def twin(q, k, v, heads, *, kv_heads=None, causal=False, mask=None, scale=None):
    """softmax(scale q k^T + mask) v in float64, [B, S, H D]; a row that sees nothing is zero."""
    batch, seq, _ = q.shape
    q, k, v = (
        x.double().view(batch, seq, n, -1).transpose(1, 2)
        for x, n in zip((q, k, v), (heads, kv_heads or heads, kv_heads or heads))
    )
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + mask.double()[:, None, None]
    if causal:
        scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), -torch.inf)
    seen = scores.amax(-1, keepdim=True) > -1e30
    weights = torch.where(seen, torch.softmax(scores.where(seen, torch.zeros(())), -1), 0)
    return (weights @ v).transpose(1, 2).reshape(batch, seq, -1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seq", [1, 7, 16, 17, 65, 130])
def test_every_length_with_and_without_masks(seq, batch, causal, threads):
    for heads, kv_heads, dim in ((4, 4, 32), (4, 2, 20), (3, 1, 7)):
        q, k, v = draw(batch, seq, heads, kv_heads, dim)
        random = torch.randn(batch, seq, generator=torch.Generator().manual_seed(1))
        for mask in (None, random > -0.5, random):
            got = attention(
                to_panels(q), to_panels(k), to_panels(v), batch, seq, heads,
                kv_heads=kv_heads, causal=causal, mask_BS=mask,
            )  # fmt: skip
            added = mask if mask is None or mask.is_floating_point() else torch.zeros(()).where(mask, -torch.inf)
            exact = twin(q, k, v, heads, kv_heads=kv_heads, causal=causal, mask=added)
            error = float((to_rows(got, batch, seq) - exact).abs().max())
            assert error < ATOL, (heads, kv_heads, dim, error)


def test_agrees_with_torch_itself():
    q, k, v = draw(2, 40, 3, 3, 16)
    split = [x.view(2, 40, 3, 16).transpose(1, 2) for x in (q, k, v)]
    theirs = scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).reshape(2, 40, 48)
    ours = attention(to_panels(q), to_panels(k), to_panels(v), 2, 40, 3, causal=True)
    torch.testing.assert_close(to_rows(ours, 2, 40), theirs, atol=4e-6, rtol=0)


def test_one_fused_product_serves_as_q_k_and_v(threads):
    batch, seq, heads, dim = 3, 33, 2, 8
    q, k, v = draw(batch, seq, heads, heads, dim)
    pad = torch.full((batch, seq, 5), torch.nan)
    fused = to_panels(torch.cat((pad, q, pad, k, v), -1))
    plan = plan_attention(
        batch, seq, heads, dim, scale=0.3, features=(58, 58, 58, 20), offsets=(5, 26, 42, 4), threads=threads
    )
    y, around = poisoned_like(empty_panels(batch, seq, 20))
    at = fused.data_ptr()
    plan.run(at, at, at, y.data_ptr(), 0)
    got = to_rows(y, batch, seq)
    assert got[..., :4].isnan().all() and all(side.isnan().all() for side in around)
    assert float((got[..., 4:] - twin(q, k, v, heads, scale=0.3)).abs().max()) < ATOL


def test_padding_queries_write_finite_values():
    q, k, v = (to_panels(x) for x in draw(3, 17, 2, 2, 8))
    y, _ = poisoned_like(empty_panels(3, 17, 16))
    plan_attention(3, 17, 2, 8).run(q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), 0)
    positions = y.transpose(1, 2).reshape(-1, 16)[: 3 * 32].view(3, 2, 16, 16)
    assert positions.isfinite().all()


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_queries_that_see_nothing_give_zeros(hidden):
    q, k, v = draw(2, 70, 2, 2, 8)
    mask = torch.zeros(2, 70)
    mask[0] = hidden
    mask[1, :66] = hidden
    y = to_rows(attention(to_panels(q), to_panels(k), to_panels(v), 2, 70, 2, causal=True, mask_BS=mask), 2, 70)
    assert (y[0] == 0).all() and (y[1, :66] == 0).all() and y[1, 66:].abs().min() > 0


def test_large_scores_neither_overflow_nor_lose_the_largest():
    q, k, v = draw(1, 130, 1, 1, 8)
    q, k = 300 * q, 300 * k
    y = to_rows(attention(to_panels(q), to_panels(k), to_panels(v), 1, 130, 1), 1, 130)
    # The winner takes all, unless two scores tie to within the rounding of numbers near 10^5.
    assert y.isfinite().all() and float((y - twin(q, k, v, 1)).abs().mean()) < 1e-2


def test_a_nan_reaches_its_own_sequence_only():
    q, k, v = draw(2, 20, 2, 2, 8)
    k[0, 3, 1] = torch.nan
    y = to_rows(attention(to_panels(q), to_panels(k), to_panels(v), 2, 20, 2), 2, 20)
    assert y[0, :, :8].isnan().all() and y[0, :, 8:].isfinite().all() and y[1].isfinite().all()


def test_repeated_and_concurrent_calls_agree(threads):
    q, k, v = (to_panels(x) for x in draw(3, 65, 4, 4, 16))
    first = attention(q, k, v, 3, 65, 4)
    with ThreadPoolExecutor(4) as pool:
        others = list(pool.map(lambda _: attention(q, k, v, 3, 65, 4), range(16)))
    assert all(torch.equal(to_rows(first, 3, 65), to_rows(other, 3, 65)) for other in others)


def test_no_positions_at_all():
    plan_attention(0, 5, 2, 8).run(0, 0, 0, 0, 0)
    plan_attention(2, 0, 2, 8).run(0, 0, 0, 0, 0)


def test_errors_say_what_to_do():
    q, k, v = (to_panels(x) for x in draw(1, 5, 4, 2, 8))
    with pytest.raises(FormatError, match="kv_heads must divide"):
        attention(q, k, v, 1, 5, 4, kv_heads=3)
    with pytest.raises(FormatError, match=r"k must be .* for 1 x 5 positions"):
        attention(q, k, v, 1, 5, 4)
    with pytest.raises(FormatError, match="multiple of 5 heads"):
        attention(q, k, v, 1, 5, 5)
    with pytest.raises(FormatError, match="mask must be"):
        attention(q, k, v, 1, 5, 4, kv_heads=2, mask_BS=torch.zeros(1, 6))
    with pytest.raises(FormatError, match="v needs features 20 to 35, got panels of 32"):
        plan_attention(1, 5, 4, 8, kv_heads=2, features=(32, 32, 32, 32), offsets=(0, 0, 20, 0))
