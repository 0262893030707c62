"""Sparse weights in bfloat16 or int8 times activations in panels: y = act(W x + b), summed in 32 bits.

Shapes: P panels, K inputs, M outputs, W positions of a panel (whole cache lines).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.arrange import Arranged
from gossamer.kernels.cpu.checks import activation_code, need_apart, need_bias, need_floats, need_tensor, need_used
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.narrow import Narrow
from gossamer.kernels.cpu.plan import remember
from gossamer.kernels.cpu.quantise import Quantised, need_scales, quantise_panels
from gossamer.kernels.cpu.shares import share_out
from gossamer.kernels.cpu.target import features, lanes
from gossamer.kernels.cpu.threads import thread_number_at

LINE = 64
# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 1_000_000
OUTPUTS = {torch.bfloat16: (torch.bfloat16, torch.float32), torch.int8: (torch.float32,)}
_ZERO = torch.zeros(16, dtype=torch.float32, device="cpu")


def plan_narrow(
    weights: Narrow,
    *,
    panels: int,
    width: int,
    used: int | None = None,
    used_last: int | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    threads: int,
) -> Launch:
    """Lay out y = act(W x + b) on bfloat16 or quantised panels x [P, K, W]; see `spmm_panels.plan_panels`.

    The plan runs on the addresses of x, y and bias (float32, 0 for none), and for int8 of the scales of x, float32
    [P, W]. x may not be y.

    Args:
        weights: W [M, K].
        panels, width, used, used_last, activation, threads: as in `plan_panels`; rows of x fill whole cache lines.
        out_dtype: of y [P, M, W]: bfloat16 (the default) or float32; int8 weights write float32.

    Raises:
        FormatError: width, used or out_dtype do not fit.
        UnknownName: no such activation.

    Example:
        >>> plan = plan_narrow(weights, panels=2, width=64, activation="relu", threads=1)
        >>> plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    """
    code, used = activation_code(activation), width if used is None else used
    used_last = used if used_last is None else used_last
    dtype = OUTPUTS[weights.dtype][0] if out_dtype is None else out_dtype
    _check(weights.dtype, panels, width, used, used_last, dtype)
    item, size = weights.dtype.itemsize, dtype.itemsize
    vectors = [-(-used // lanes())] * (panels - 1) + [-(-used_last // lanes())] * (panels > 0)
    strides = (
        item * width, size * width, item * width * weights.cols, size * width * weights.rows, 4 * width,
    )  # fmt: skip
    return lay_out(weights, vectors, strides, code, size, threads)


def lay_out(
    weights: Narrow,
    vectors: list[int],
    strides: tuple[int, int, int, int, int],
    code: int,
    out_bytes: int,
    threads: int,
    *,
    shift: int = 0,
    mask: Tensor | None = None,
) -> Launch:
    """A plan over `vectors` vectors of positions of each panel.

    Args:
        strides: bytes from one index of x to the next, between rows of y, and between panels of x, of y, of scales.
        shift: bytes from y's address to its first position.
        mask: int32, 0 at the positions whose result is to be zero, -1 at the others; as long as the vectors.
    """
    from gossamer.kernels.cpu.narrow_loops import kernel, widest

    way, index_bytes = way_of(weights.dtype), weights.indices_Rd.element_size()
    entry = kernel(way, weights.g, index_bytes, code, out_bytes, int(mask is not None))
    threads = max(1, min(threads, weights.values_Rgd.numel() * lanes() * sum(vectors) // GRAIN))
    arranged = Arranged(1, weights.starts_G, weights.indices_Rd, weights.values_Rgd)
    # Odd vectors interleave half a register: rather one narrow tile than several of them.
    quantised = weights.dtype == torch.int8
    line = max(1, LINE // (lanes() * (4 if quantised else weights.dtype.itemsize)))
    work = share_out(vectors, widest(weights.g), 1, arranged, threads, alike=False, line=line)
    fixed = (
        len(work.share_starts) - 1, work.share_starts.data_ptr(), work.tasks_T4.data_ptr(), work.tiles_Q3.data_ptr(),
        *strides, weights.rows, *arranged.addresses, _address(weights.offsets_M), _address(weights.scales_M),
        shift, _address(mask), _ZERO.data_ptr(), thread_number_at(),
    )  # fmt: skip
    return launch(
        entry, addresses=4 if quantised else 3, fixed=fixed if quantised else (0, *fixed), threads=threads,
        holds=(weights, work, mask),
    )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def way_of(dtype: torch.dtype) -> int:
    """Which of `narrow_tiles.WAYS` this processor takes: its dot product, or 32-bit arithmetic."""
    if dtype == torch.int8:
        return 2 + ({"avx512vnni", "avx512vbmi", "avx512bw"} <= features())
    return int({"avx512bf16", "avx512bw"} <= features())


def _check(kind: torch.dtype, panels: int, width: int, used: int, used_last: int, out_dtype: torch.dtype) -> None:
    line = LINE // kind.itemsize
    if width <= 0 or width % line:
        raise FormatError(f"panels for {kind} are a positive multiple of {line} positions wide, got {width}; pad them")
    need_used(panels, width, used, used_last)
    if out_dtype not in OUTPUTS[kind]:
        names = " or ".join(str(dtype) for dtype in OUTPUTS[kind])
        raise FormatError(f"products of {kind} weights write {names}, got {out_dtype}")


def multiply(
    weights: Narrow,
    x_PKW: Tensor | Quantised,
    bias_M: Tensor | None,
    activation: str,
    out: Tensor | None,
    used: int | None,
) -> Tensor:
    """`spmm_panels` for narrow weights: into `out`, or into new panels. int8 weights quantise float32 panels first."""
    if weights.dtype == torch.int8 and isinstance(x_PKW, Tensor):
        x_PKW = quantise_panels(x_PKW, used)
    x, scales = (x_PKW.codes_PKW, x_PKW.scales_PW) if isinstance(x_PKW, Quantised) else (x_PKW, None)
    _check_tensors(weights, x, scales, bias_M, out, used)
    panels, _, width = x.shape
    if out is None:
        out = torch.empty(panels, weights.rows, width, dtype=OUTPUTS[weights.dtype][0], device="cpu")
    if out.numel():
        threads = torch.get_num_threads()
        key = (panels, width, used, activation, out.dtype, threads, weights.addresses)
        if (plan := weights.plans.get(key)) is None:
            plan = plan_narrow(
                weights, panels=panels, width=width, used=used, activation=activation, out_dtype=out.dtype,
                threads=threads,
            )  # fmt: skip
            remember(weights, key, plan)
        last = () if scales is None else (scales.data_ptr(),)
        plan.run(x.data_ptr(), out.data_ptr(), 0 if bias_M is None else bias_M.data_ptr(), *last)
    return out


def _check_tensors(
    weights: Narrow, x: Tensor, scales: Tensor | None, bias: Tensor | None, out: Tensor | None, used: int | None
) -> None:
    kind = torch.uint8 if weights.dtype == torch.int8 else weights.dtype
    need_tensor("x", x, (kind,), f"[P, {weights.cols}, W]", x.dim() == 3 and x.shape[1] == weights.cols)
    need_bias(weights.rows, bias)
    if scales is not None:
        shape = (x.shape[0], x.shape[2])
        need_floats("scales of x", scales, str(list(shape)), tuple(scales.shape) == shape)
        need_scales(scales[:, :used])
    if out is not None:
        shape = (x.shape[0], weights.rows, x.shape[2])
        need_tensor("out", out, OUTPUTS[weights.dtype], str(list(shape)), tuple(out.shape) == shape)
        need_apart(out, (x, scales, bias))
