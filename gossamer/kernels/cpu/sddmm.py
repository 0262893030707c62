"""Sampled dense-dense product on the CPU: dW[e] = sum over tokens of dY[t, row(e)] * X[t, col(e)], kept entries only.

Shapes: T tokens, K inputs, M outputs, N row groups of g rows, E stored entries, P panels of W = 64 tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import need_floats, output
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.stream import Stream
from gossamer.kernels.cpu.tokens import WIDTH, rows_to_panels

# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 500_000


def sampled_product(
    stream: Stream, y: Tensor, x: Tensor, out: Tensor | None = None, *, tokens: int | None = None
) -> Tensor:
    """Multiply two dense matrices at the entries of a sparse one: out[e, r] = <y[:, row(e) + r], x[:, col(e)]>.

    This is the gradient of a sparse product by its kept weights, with y the gradient by its output. Work and memory
    follow the entries: 2 E g T operations, and no [M, K] matrix anywhere.

    Args:
        stream: whose entries are wanted; its values are not read.
        y: float32 [T, M], contiguous; or token panels [P, N g, W], zero in rows past M and lanes past T.
        x: float32 [T, K], contiguous; or token panels [P, K, W], zero in lanes past T.
        out: where to write, [E, g]; made when None.
        tokens: T, where panels are given; P W when None.

    Raises:
        FormatError: a shape, dtype or layout does not fit; the message says which.

    Example:
        >>> dw = sampled_product(weights, dy, x)  # float32 [E, g], in the order of weights.values_EG
    """
    rows, entries = stream.groups * stream.g, stream.indices_E.shape[0]
    tokens = _tokens(y) if tokens is None else tokens
    y_PMW, x_PKW = _panels("y", y, tokens, stream.rows, rows), _panels("x", x, tokens, stream.cols, stream.cols)
    out = output(out, (entries, stream.g), (x_PKW, y_PMW))
    if not tokens:
        return out.zero_()
    if out.numel():
        index_bytes, threads = stream.indices_E.element_size(), torch.get_num_threads()
        sizes = stream.groups, stream.cols, stream.blocks, entries
        plan = plan_sampled(stream.g, index_bytes, *sizes, tokens=tokens, threads=threads)
        starts_at, indices_at, _ = stream.addresses
        plan.run(x_PKW.data_ptr(), y_PMW.data_ptr(), out.data_ptr(), starts_at, indices_at)
    return out


def _tokens(y: Tensor) -> int:
    if y.dim() not in (2, 3):
        raise FormatError(f"y must be rows [T, M] or token panels, got shape {tuple(y.shape)}; add the missing axes")
    return y.shape[0] * WIDTH if y.dim() == 3 else y.shape[0]


def _panels(name: str, given: Tensor, tokens: int, features: int, held: int) -> Tensor:
    """Token panels with `held` features of rows with `features`, or those given, once they are seen to fit."""
    if given.dim() == 3:
        shape = (-(-tokens // WIDTH), held, WIDTH)
        need_floats(name, given, f"{list(shape)} for {tokens} tokens", tuple(given.shape) == shape)
        return given
    need_floats(name, given, f"[{tokens}, {features}]", tuple(given.shape) == (tokens, features))
    return rows_to_panels(pad(given, (0, held - features)) if held > features else given)


@lru_cache(maxsize=512)
def plan_sampled(
    g: int, index_bytes: int, groups: int, cols: int, blocks: int, entries: int, *, tokens: int, threads: int
) -> Launch:
    """Lay out the sampled product for one size; `.run` takes the addresses of x, y (panels), out, starts, indices.

    Example:
        >>> plan_sampled(1, 2, 4096, 4096, 2, 167772, tokens=128, threads=2).threads
        2
    """
    from gossamer.kernels.cpu import sampled

    threads = max(1, min(threads, entries * g * tokens // GRAIN))
    tasks = 1 if threads == 1 else 2 * threads
    fixed = (tasks, WIDTH, tokens, 4 * WIDTH * cols, 4 * WIDTH * groups * g, groups, blocks, entries)
    return launch(sampled.kernel(g, index_bytes), addresses=5, fixed=fixed, threads=threads)
