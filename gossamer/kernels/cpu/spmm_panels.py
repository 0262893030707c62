"""Sparse weights times activations that stay in panels: y = act(W x + b + residual), nothing packed, nothing copied.

Shapes: P panels, K inputs, M outputs, W positions of a panel (a multiple of 16), N row groups.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.arrange import Arranged, arrange
from gossamer.kernels.cpu.bands import Bands, Part
from gossamer.kernels.cpu.checks import activation_code, need_bias, need_floats, need_used, overlap
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.narrow import Narrow
from gossamer.kernels.cpu.narrow_panels import multiply, plan_narrow
from gossamer.kernels.cpu.plan import remember
from gossamer.kernels.cpu.quantise import Quantised
from gossamer.kernels.cpu.shares import Work, share_of, share_out
from gossamer.kernels.cpu.stream import Stream
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.threads import thread_number_at

# Panels and rows start on cache lines: sixteen floats.
LINE = 16
# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 500_000
MOST_TOGETHER = 8
# What x may fill of a first-level cache of 48 KiB, and x and y together of a second-level cache of 1 MiB; and entries
# of a run that pay for reading and writing its sums (measured).
L1_BYTES, L2_BYTES, WORTHWHILE = 44 << 10, 640 << 10, 20
# Activations that are nothing but bounds; the others pass over each finished row again.
_BOUNDS = {0: None, 1: (0.0, torch.inf), 5: (0.0, 6.0)}
_BOUND_TABLE = torch.tensor([pair for pair in _BOUNDS.values() if pair], dtype=torch.float32, device="cpu")
_ZEROS = torch.zeros(LINE, dtype=torch.float32, device="cpu")
_kernels: dict[tuple[int, int, int], object] = {}
# Held while arranged copies are made or follow their values: plans of all threads read the same copy.
_arranging = threading.Lock()


def resident_kernel(g: int, index_bytes: int, ordered: int = 0):
    """The compiled kernel; Numba is imported here, on first use."""
    found = _kernels.get((g, index_bytes, ordered))
    if found is None:
        from gossamer.kernels.cpu import resident

        found = _kernels[g, index_bytes, ordered] = resident.kernel(g, index_bytes, ordered)
    return found


def plan_panels(
    stream: Stream | Narrow,
    *,
    panels: int,
    width: int,
    used: int | None = None,
    used_last: int | None = None,
    activation: str = "none",
    residual: bool = False,
    out_dtype: torch.dtype | None = None,
    threads: int,
) -> Launch:
    """Lay out y = act(W x + b + residual) on panels x [P, K, W], y and residual [P, M, W].

    The weights' dtype decides: float32 streams read float32 panels, `Narrow` weights bfloat16
    ones or codes and scales (see `narrow_panels.plan_narrow`), without residual.
    The plan runs on the addresses of x, y, bias (0 for none) and, with `residual`, of the residual. All start on
    64-byte boundaries. The residual may be y itself; x may not.

    Args:
        stream: the weights W [M, K]; values changed later need a new plan.
        panels: P.
        width: W, floats from one feature of a panel to the next, a multiple of 16.
        used: positions of every panel that matter, 1 to `width`; the vectors beyond are not computed. All when None.
        used_last: the same for the last panel; `used` when None.
        activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".
        residual: whether a residual is added before the activation.
        out_dtype: of y; bfloat16 weights write bfloat16 (the default) or float32, others float32.
        threads: at most this many; fewer where the work does not pay for them.

    Raises:
        FormatError: width, used or out_dtype do not fit, or these weights take no residual.
        UnknownName: no such activation.

    Example:
        >>> plan = plan_panels(weights, panels=2, width=64, activation="relu", threads=1)
        >>> plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    """
    if isinstance(stream, Narrow):
        _no_residual(residual)
        return plan_narrow(
            stream, panels=panels, width=width, used=used, used_last=used_last, activation=activation,
            out_dtype=out_dtype, threads=threads,
        )  # fmt: skip
    if out_dtype not in (None, torch.float32):
        raise FormatError(f"float32 weights write float32, got out_dtype {out_dtype}; take bfloat16 weights")
    code, used = activation_code(activation), width if used is None else used
    used_last = used if used_last is None else used_last
    _check(panels, width, used, used_last)
    return _lay_out(stream, panels, width, used, used_last, code, residual, threads)


def _no_residual(given: bool) -> None:
    if given:
        raise FormatError("products of narrow weights add no residual; add it to y, or take float32 weights")


def _check(panels: int, width: int, used: int, used_last: int) -> None:
    if width <= 0 or width % LINE:
        raise FormatError(f"panels are a positive multiple of {LINE} positions wide, got {width}; pad them")
    need_used(panels, width, used, used_last)


def _lay_out(
    stream: Stream, panels: int, width: int, used: int, used_last: int, code: int, residual: bool, threads: int
) -> Launch:
    from gossamer.kernels.cpu.resident import widest

    ordered = stream.order_M is not None
    entry, wide = resident_kernel(stream.g, stream.indices_E.element_size(), int(ordered)), widest(stream.g)
    places = stream.places() if ordered else _ZEROS
    arranged = arranged_for(stream, blocks_for(stream, wide))
    vectors = [-(-used // lanes())] * (panels - 1) + [-(-used_last // lanes())] * (panels > 0)
    amount = stream.values_EG.numel() * lanes() * sum(vectors)
    # Few vectors are cut by rows instead, which threads take as they come.
    banded = panels == 1 and sum(vectors) >= 2 * threads
    threads = max(1, min(threads, amount // GRAIN))
    line = max(1, LINE // lanes())
    work = share_out(vectors, wide, _tiles_together(stream, wide), arranged, threads, line=line)
    hold = -(-(64 + 4 * stream.g * lanes() * wide) // 64) * 64
    scratch = hold * work.together

    def numbers(work: Work) -> tuple[int, ...]:
        return (
            *(() if residual else (0,)),
            len(work.share_starts) - 1, work.share_starts.data_ptr(), work.tasks_T4.data_ptr(),
            work.tiles_Q3.data_ptr(), 4 * width, 4 * width * stream.cols, 4 * width * stream.rows,
            stream.rows, stream.groups, arranged.blocks, *arranged.addresses, _bounds_at(code),
            0 if code in _BOUNDS else code, _ZEROS.data_ptr(), hold, scratch, thread_number_at(),
            places.data_ptr() if ordered else 0,
        )  # fmt: skip

    def part(first: int, last: int) -> Part:
        own = share_of(vectors, wide, work.together, arranged, first // lanes(), -(-last // lanes()))
        return Part(numbers(own), holds=(own,))

    return launch(
        entry, addresses=4 if residual else 3, fixed=numbers(work), threads=threads, scratch_bytes=threads * scratch,
        holds=(arranged, work, places), bands=Bands(amount, used_last, lanes(), scratch, part) if banded else None,
    )  # fmt: skip


def _bounds_at(code: int) -> int:
    """Address of the two bounds that an activation amounts to; 0 for the others."""
    return _BOUND_TABLE.data_ptr() + 8 * (code == 5) if _BOUNDS.get(code) else 0


def _tiles_together(stream: Stream, wide: int) -> int:
    """Tiles whose x and y stay in the second-level cache, so that they can share each block of weights."""
    return min(MOST_TOGETHER, max(1, L2_BYTES // (4 * lanes() * wide * max(1, stream.rows + stream.cols))))


def blocks_for(stream: Stream, wide: int) -> int:
    """Blocks of columns so that x stays in the first-level cache, unless rows are too short to be cut."""
    if stream.g >= 4:
        columns = L2_BYTES // (4 * lanes() * wide)
    else:
        each = stream.values_EG.shape[0] / max(1, stream.groups * stream.cols)
        columns = max(L1_BYTES // (4 * lanes() * wide), round(WORTHWHILE / max(each, 1e-6)))
    return max(1, -(-stream.cols // columns))


def _version(stream: Stream) -> int:
    """Counts changes of the values in place."""
    return 0 if stream.values_EG.is_inference() else stream.values_EG._version


def arranged_for(stream: Stream, blocks: int) -> Arranged:
    """The stream arranged in so many blocks: made once for weights that stay where they are."""
    with _arranging:
        held = stream.arrangements.get(blocks)
        if held is None or held[0] != stream.addresses:
            held = stream.arrangements[blocks] = [stream.addresses, _version(stream), arrange(stream, blocks)]
        return held[2]


def _refresh(stream: Stream) -> None:
    """Let arranged copies follow values that were changed in place."""
    with _arranging:
        now = _version(stream)
        for held in stream.arrangements.values():
            if held[1] != now:
                held[2].refresh(stream.values_EG)
                held[1] = now


def spmm_panels(
    stream: Stream | Narrow,
    x_PKW: Tensor | Quantised,
    bias_M: Tensor | None = None,
    activation: str = "none",
    residual_PMW: Tensor | None = None,
    out: Tensor | None = None,
    used: int | None = None,
) -> Tensor:
    """Multiply panels by sparse weights where they lie: y = act(W x + b + residual).

    Args:
        stream: the weights W [M, K]; their dtype is that of x.
        x_PKW: float32 [P, K, W], contiguous, W a multiple of 16, 64-byte aligned; or bfloat16, W a multiple of 32; or
            for int8 weights `quantise_panels(x)` or float32 panels to be quantised so, W a multiple of 64.
        bias_M: float32 [M].
        activation: as in `plan_panels`.
        residual_PMW: float32 [P, M, W], added before the activation; may be `out`.
        out: where to write, [P, M, W]; made when None. It may not overlap x. bfloat16 weights write float32, too.
        used: positions of every panel that matter; what lies beyond is left as it was, or padding.

    Raises:
        FormatError: a shape, dtype, alignment or overlap does not fit.
        UnknownName: no such activation.

    Example:
        >>> y_PMW = spmm_panels(weights, x_PKW, bias, "relu", used=49)
    """
    if isinstance(stream, Narrow):
        _no_residual(residual_PMW is not None)
        return multiply(stream, x_PKW, bias_M, activation, out, used)
    _check_tensors(stream, x_PKW, bias_M, residual_PMW, out)
    panels, _, width = x_PKW.shape
    out = aligned_panels(panels, stream.rows, width) if out is None else out
    if out.numel():
        added, threads = residual_PMW is not None, torch.get_num_threads()
        _refresh(stream)
        key = ("panels", panels, width, used, activation, added, threads, stream.addresses)
        if (plan := stream.plans.get(key)) is None:
            plan = plan_panels(
                stream, panels=panels, width=width, used=used, activation=activation, residual=added, threads=threads
            )
            remember(stream, key, plan)
        last = () if residual_PMW is None else (residual_PMW.data_ptr(),)
        plan.run(x_PKW.data_ptr(), out.data_ptr(), 0 if bias_M is None else bias_M.data_ptr(), *last)
    return out


def aligned_panels(panels: int, features: int, width: int) -> Tensor:
    """Uninitialised float32 [P, features, W] that starts on a 64-byte boundary."""
    count = panels * features * width
    whole = torch.empty(count + LINE, dtype=torch.float32, device="cpu")
    first = -(whole.data_ptr() // 4) % LINE
    return whole[first : first + count].view(panels, features, width)


def _check_tensors(stream: Stream, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> None:
    need_floats("x", x, f"[P, {stream.cols}, W]", x.dim() == 3 and x.shape[1] == stream.cols)
    need_bias(stream.rows, bias)
    shape = (x.shape[0], stream.rows, x.shape[2])
    for name, tensor in (("out", out), ("residual", residual)):
        if tensor is not None:
            need_floats(name, tensor, str(list(shape)), tuple(tensor.shape) == shape)
    for name, tensor in (("x", x), ("out", out), ("residual", residual)):
        if tensor is not None and tensor.data_ptr() % 64:
            raise FormatError(f"{name} must start on a 64-byte boundary; make it with aligned_panels")
    if out is not None and overlap(x, out):
        raise FormatError("out overlaps x, which is still read while out is written; give it memory of its own")
    if out is not None and residual is not None and overlap(residual, out) and residual.data_ptr() != out.data_ptr():
        raise FormatError("residual overlaps out in part; it must be out itself or lie apart")
