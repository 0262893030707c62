"""Sparse weights times activations that stay in panels: y = act(W x + b + residual), nothing packed, nothing copied.

Shapes: P panels, K inputs, M outputs, W positions of a panel (a multiple of 16), N row groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import activation_code, need_bias, need_floats
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.plan import remember
from gossamer.kernels.cpu.stream import Stream
from gossamer.kernels.cpu.target import lanes

# Panels and rows start on cache lines: sixteen floats.
LINE = 16
# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 500_000
# Activations that are nothing but bounds; the others pass over each finished row again.
_BOUNDS = {0: None, 1: (0.0, torch.inf), 5: (0.0, 6.0)}
_BOUND_TABLE = torch.tensor([pair for pair in _BOUNDS.values() if pair], dtype=torch.float32, device="cpu")
_ZEROS = torch.zeros(LINE, dtype=torch.float32, device="cpu")
_kernels: dict[tuple[int, int], object] = {}


def resident_kernel(g: int, index_bytes: int):
    """The compiled kernel; Numba is imported here, on first use."""
    found = _kernels.get((g, index_bytes))
    if found is None:
        from gossamer.kernels.cpu import resident

        found = _kernels[g, index_bytes] = resident.kernel(g, index_bytes)
    return found


def plan_panels(
    stream: Stream,
    *,
    panels: int,
    width: int,
    used: int | None = None,
    used_last: int | None = None,
    activation: str = "none",
    residual: bool = False,
    threads: int,
) -> Launch:
    """Lay out y = act(W x + b + residual) on panels x [P, K, W], y and residual [P, M, W].

    The plan runs on the addresses of x, y, bias (0 for none) and, with `residual`, of the residual. All start on
    64-byte boundaries. The residual may be y itself; x may not.

    Args:
        stream: the weights W [M, K]; they must stay where they are while the plan is used.
        panels: P.
        width: W, floats from one feature of a panel to the next, a multiple of 16.
        used: positions of every panel that matter, 1 to `width`; the vectors beyond are not computed. All when None.
        used_last: the same for the last panel; `used` when None.
        activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".
        residual: whether a residual is added before the activation.
        threads: at most this many; fewer where the work does not pay for them.

    Raises:
        FormatError: width or used do not fit.
        UnknownName: no such activation.

    Example:
        >>> plan = plan_panels(weights, panels=2, width=64, activation="relu", threads=1)
        >>> plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    """
    code, used = activation_code(activation), width if used is None else used
    used_last = used if used_last is None else used_last
    _check(panels, width, used, used_last)
    return _lay_out(stream, panels, width, used, used_last, code, residual, threads)


def _check(panels: int, width: int, used: int, used_last: int) -> None:
    if width <= 0 or width % LINE:
        raise FormatError(f"panels are a positive multiple of {LINE} positions wide, got {width}; pad them")
    if panels < 0 or not (0 < used <= width and 0 < used_last <= width):
        raise FormatError(
            f"used positions lie in 1..{width}, got {used} and {used_last} in the last of {panels} panels"
        )


def _lay_out(
    stream: Stream, panels: int, width: int, used: int, used_last: int, code: int, residual: bool, threads: int
) -> Launch:
    from gossamer.kernels.cpu.resident import widest

    entry = resident_kernel(stream.g, stream.indices_E.element_size())
    vectors, last = -(-used // lanes()), -(-used_last // lanes())
    tiles = -(-max(vectors, last) // widest(stream.g))
    worth = stream.values_EG.numel() * (used * (panels - 1) + used_last) // GRAIN
    threads = max(1, min(threads, worth))
    chunks = _chunks(panels * tiles, -(-stream.groups * stream.g // LINE), threads)
    cuts_C = _cuts(stream, chunks)
    tasks = panels * tiles * chunks if stream.rows else 0
    bounded = _BOUNDS.get(code)
    bounds_at = _BOUND_TABLE.data_ptr() + 8 * (code == 5) if bounded else 0
    scratch = 64 + 4 * stream.g * lanes() * widest(stream.g)
    scratch = -(-scratch // 64) * 64
    fixed = (
        tasks, chunks, tiles, panels, vectors, last, 4 * width, 4 * width * stream.cols, 4 * width * stream.rows,
        stream.rows, stream.groups, stream.blocks, *stream.addresses, cuts_C.data_ptr(), bounds_at,
        0 if code in _BOUNDS else code, _ZEROS.data_ptr(), scratch,
    )  # fmt: skip
    threads = max(1, min(threads, tasks))
    return launch(
        entry, addresses=4 if residual else 3, fixed=fixed if residual else (0, *fixed), threads=threads,
        scratch_bytes=threads * scratch, holds=(stream, cuts_C),
    )  # fmt: skip


def _chunks(places: int, most: int, threads: int) -> int:
    """Into how many runs of rows each tile is cut, so that no thread waits for long; 1 when there is one thread."""
    if threads == 1 or places == 0:
        return 1
    for chunks in range(1, 4 * threads):
        tasks = places * chunks
        if -(-tasks // threads) * threads <= 1.1 * tasks:
            return max(1, min(chunks, most))
    return max(1, min(threads, most))


def _cuts(stream: Stream, chunks: int) -> Tensor:
    """Group numbers int32 [chunks + 1] that cut the rows into runs of about as many entries each."""
    entries_N = stream.starts_BG[-1].to(torch.int64) - stream.starts_BG[0] + 4
    reached_N = entries_N.cumsum(0)
    wanted = torch.arange(1, chunks) * (int(reached_N[-1]) if stream.groups else 0) / chunks
    inner = torch.searchsorted(reached_N.double(), wanted.double())
    ends = torch.tensor([0, stream.groups])
    return torch.cat([ends[:1], inner, ends[1:]]).to(torch.int32)


def spmm_panels(
    stream: Stream,
    x_PKW: Tensor,
    bias_M: Tensor | None = None,
    activation: str = "none",
    residual_PMW: Tensor | None = None,
    out: Tensor | None = None,
    used: int | None = None,
) -> Tensor:
    """Multiply panels by sparse weights where they lie: y = act(W x + b + residual).

    Args:
        stream: the weights W [M, K].
        x_PKW: float32 [P, K, W], contiguous, W a multiple of 16, 64-byte aligned.
        bias_M: float32 [M].
        activation: as in `plan_panels`.
        residual_PMW: float32 [P, M, W], added before the activation; may be `out`.
        out: where to write, [P, M, W]; made when None. It may not overlap x.
        used: positions of every panel that matter; what lies beyond is left as it was, or padding.

    Raises:
        FormatError: a shape, dtype, alignment or overlap does not fit.
        UnknownName: no such activation.

    Example:
        >>> y_PMW = spmm_panels(weights, x_PKW, bias, "relu", used=49)
    """
    _check_tensors(stream, x_PKW, bias_M, residual_PMW, out)
    panels, _, width = x_PKW.shape
    out = aligned_panels(panels, stream.rows, width) if out is None else out
    if out.numel():
        added, threads = residual_PMW is not None, torch.get_num_threads()
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
    if out is not None and _overlap(x, out):
        raise FormatError("out overlaps x, which is still read while out is written; give it memory of its own")
    if out is not None and residual is not None and _overlap(residual, out) and residual.data_ptr() != out.data_ptr():
        raise FormatError("residual overlaps out in part; it must be out itself or lie apart")


def _overlap(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + 4 * b.numel() and b.data_ptr() < a.data_ptr() + 4 * a.numel()
