"""Attention on token panels: softmax(scale * q k^T + mask) v for every head, one query a lane.

Shapes: B sequences, S positions, H heads, D features of a head, P panels of W positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import need_counts, need_floats
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.memory import floats
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.tokens import WIDTH, empty_panels, float_bits, need_panels, padded

# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 1_000_000
_LOG2_E = math.log2(math.e)


def plan_attention(
    batch: int,
    seq: int,
    heads: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    features: tuple[int, int, int, int] | None = None,
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    mask_row: int | None = None,
    threads: int = 1,
) -> Launch:
    """Lay attention out for one size of work; `.run(q, k, v, y, mask)` takes addresses.

    q, k, v and y lie in token panels, each with its own number of features per panel and its first feature, so that
    one fused product [P, 3 H D, W] serves as all three. y must not overlap them. `mask` is the address of a float
    added to every score of a key, one per position and sequence, or 0 for none; keys at -inf, or at float32's lowest
    number, are not seen, and queries that see none give zeros.

    Args:
        batch: B.
        seq: S; positions from S to the next multiple of 16 are padding, never read as keys.
        heads: H; head h owns features h D to h D + D - 1.
        head_dim: D.
        kv_heads: heads of k and v when several heads of q share one; must divide H.
        causal: whether position i sees only positions up to i.
        scale: what q k^T is multiplied by; 1 / sqrt(D) unless given.
        features: features per panel of q, k, v and y; H D, and kv_heads D for k and v, unless given.
        offsets: first feature of q, k, v and y in their panels.
        mask_row: floats from one sequence's mask to the next; S unless given.
        threads: how many threads may work.

    Raises:
        FormatError: the heads or the features do not fit.

    Example:
        >>> fused = plan_attention(32, 64, 12, 32, features=(1152, 1152, 1152, 384), offsets=(0, 384, 768, 0))

    Reference: Dao et al., FlashAttention, NeurIPS 2022, for the running maximum and sum.
    """
    from gossamer.kernels.cpu import attention_loops as loops

    kv_heads = heads if kv_heads is None else kv_heads
    need_counts(batch=batch, seq=seq)
    if head_dim < 1:
        raise FormatError(
            f"a head needs at least one feature, got {head_dim}; q has too few features for {heads} heads"
        )
    _need_even(heads, kv_heads)
    features = _features(heads, kv_heads, head_dim, features, offsets)
    tiles = -(-padded(seq) // (lanes() * loops.WIDEST))
    row, spare = 4 * lanes() * loops.WIDEST, loops.SPARE
    scratch = (2 * head_dim + WIDTH + 2 * spare + 3) * row + 4 * (WIDTH + spare) + 64
    scratch += -scratch % 64
    tasks = batch * heads * tiles
    work = 2 * batch * heads * seq * seq * head_dim // (2 if causal else 1)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    strides = [4 * WIDTH * number for pair in zip(features, offsets) for number in pair]
    fixed = (
        tasks, scratch, seq, heads, heads // kv_heads, head_dim, tiles, WIDTH, padded(seq), int(causal),
        float_bits(scale * _LOG2_E), 4 * (seq if mask_row is None else mask_row), *strides,
    )  # fmt: skip
    threads = max(1, min(threads, tasks, work // GRAIN))
    return launch(loops.kernel(), addresses=5, fixed=fixed, threads=threads, scratch_bytes=scratch * threads)


def _need_even(heads: int, kv_heads: int) -> None:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise FormatError(f"kv_heads must divide the {heads} heads of q, got {kv_heads}; heads share keys evenly")


def _features(heads, kv_heads, head_dim, features, offsets) -> tuple[int, int, int, int]:
    """Features per panel of q, k, v and y, once they are seen to hold every head."""
    own, shared = heads * head_dim, kv_heads * head_dim
    wanted = (own, shared, shared, own)
    features = wanted if features is None else features
    for name, there, offset, needed in zip("qkvy", features, offsets, wanted):
        if offset < 0 or offset + needed > there:
            raise FormatError(f"{name} needs features {offset} to {offset + needed - 1}, got panels of {there}")
    return features


def attention(
    q_PKW: Tensor,
    k_PKW: Tensor,
    v_PKW: Tensor,
    batch: int,
    seq: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    mask_BS: Tensor | None = None,
) -> Tensor:
    """Attention of every head on token panels; see `rows_to_panels` for how they are made.

    Args:
        q_PKW: float32 panels of H D features.
        k_PKW: float32 panels of kv_heads D features.
        v_PKW: likewise.
        batch: B.
        seq: S.
        heads: H.
        kv_heads: heads of k and v; H unless given.
        causal: whether position i sees only positions up to i.
        scale: 1 / sqrt(D) unless given.
        mask_BS: bool (True is seen) or float32 (added to scores) [B, S], one per key.

    Raises:
        FormatError: a shape, dtype or layout does not fit.

    Example:
        >>> y = attention(q, k, v, batch=2, seq=17, heads=12)
    """
    kv_heads = heads if kv_heads is None else kv_heads
    _need_even(heads, kv_heads)
    if q_PKW.dim() != 3 or q_PKW.shape[1] % heads:
        raise FormatError(f"q must be panels whose features are a multiple of {heads} heads, got {tuple(q_PKW.shape)}")
    head_dim = q_PKW.shape[1] // heads
    for name, data, count in (("q", q_PKW, heads), ("k", k_PKW, kv_heads), ("v", v_PKW, kv_heads)):
        need_panels(name, data, batch, seq, count * head_dim)
    mask_BS = _additive(mask_BS, batch, seq)
    plan = plan_attention(
        batch, seq, heads, head_dim, kv_heads=kv_heads, causal=causal, scale=scale, threads=torch.get_num_threads()
    )
    y_PKW = empty_panels(batch, seq, heads * head_dim)
    mask_at = 0 if mask_BS is None else mask_BS.data_ptr()
    plan.run(q_PKW.data_ptr(), k_PKW.data_ptr(), v_PKW.data_ptr(), y_PKW.data_ptr(), mask_at)
    return y_PKW


def _additive(mask_BS: Tensor | None, batch: int, seq: int) -> Tensor | None:
    """A key mask as floats to add; a bool mask says which keys are seen."""
    if mask_BS is None:
        return None
    if mask_BS.dtype is torch.bool:
        mask_BS = floats(*mask_BS.shape).zero_().masked_fill_(~mask_BS, -torch.inf)
    need_floats("mask", mask_BS, f"[{batch}, {seq}], or bool", mask_BS.shape == (batch, seq))
    return mask_BS
