"""Sparse weights in bfloat16 times activations that stay in panels: y = act(W x + b), summed in float32.

Shapes: P panels, K inputs, M outputs, W positions of a panel (a multiple of 32, one cache line).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.arrange import Arranged
from gossamer.kernels.cpu.checks import activation_code, need_bias
from gossamer.kernels.cpu.launch import Launch, launch
from gossamer.kernels.cpu.narrow import Narrow
from gossamer.kernels.cpu.plan import remember
from gossamer.kernels.cpu.shares import share_out
from gossamer.kernels.cpu.target import features, lanes
from gossamer.kernels.cpu.threads import thread_number_at

LINE = 64
# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 1_000_000
_ZERO = torch.zeros(16, dtype=torch.float32, device="cpu")


def plan_narrow(
    weights: Narrow,
    *,
    panels: int,
    width: int,
    used: int | None = None,
    used_last: int | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    threads: int,
) -> Launch:
    """Lay out y = act(W x + b) on bfloat16 panels x [P, K, W]; see `spmm_panels.plan_panels`.

    The plan runs on the addresses of x, y and bias (float32, 0 for none). x may not be y.

    Args:
        weights: W [M, K].
        panels, width, used, used_last, activation, threads: as in `plan_panels`; width a multiple of 32.
        out_dtype: of y [P, M, W], bfloat16 or float32.

    Raises:
        FormatError: width, used or out_dtype do not fit.
        UnknownName: no such activation.

    Example:
        >>> plan = plan_narrow(weights, panels=2, width=64, activation="relu", threads=1)
        >>> plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    """
    from gossamer.kernels.cpu.narrow_loops import kernel, widest

    code, used = activation_code(activation), width if used is None else used
    used_last = used if used_last is None else used_last
    _check(panels, width, used, used_last, out_dtype)
    size, index_bytes = out_dtype.itemsize, weights.indices_Rd.element_size()
    entry = kernel(has_dot_product(), weights.g, index_bytes, code, size)
    vectors = [-(-used // lanes())] * (panels - 1) + [-(-used_last // lanes())] * (panels > 0)
    threads = max(1, min(threads, weights.values_Rgd.numel() * lanes() * sum(vectors) // GRAIN))
    arranged = Arranged(1, weights.starts_G, weights.indices_Rd, weights.values_Rgd)
    work = share_out(vectors, widest(weights.g), 1, arranged, threads)
    fixed = (
        len(work.share_starts) - 1, work.share_starts.data_ptr(), work.tasks_T4.data_ptr(), work.tiles_Q3.data_ptr(),
        2 * width, size * width, 2 * width * weights.cols, size * width * weights.rows,
        weights.rows, *arranged.addresses, _ZERO.data_ptr(), thread_number_at(),
    )  # fmt: skip
    return launch(entry, addresses=3, fixed=fixed, threads=threads, holds=(arranged, work))


def has_dot_product() -> int:
    """1 where the processor multiplies bfloat16 by pairs; 0 where kernels widen to float32."""
    return int({"avx512bf16", "avx512bw"} <= features())


def _check(panels: int, width: int, used: int, used_last: int, out_dtype: torch.dtype) -> None:
    if width <= 0 or 2 * width % LINE:
        raise FormatError(f"bfloat16 panels are a positive multiple of 32 positions wide, got {width}; pad them")
    if panels < 0 or not (0 < used <= width and 0 < used_last <= width):
        raise FormatError(
            f"used positions lie in 1..{width}, got {used} and {used_last} in the last of {panels} panels"
        )
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise FormatError(f"bfloat16 products write bfloat16 or float32, got {out_dtype}")


def multiply(
    weights: Narrow, x_PKW: Tensor, bias_M: Tensor | None, activation: str, out: Tensor | None, used: int | None
) -> Tensor:
    """`spmm_panels` for bfloat16: into `out`, which may be float32, or into new bfloat16 panels."""
    _check_tensors(weights, x_PKW, bias_M, out)
    panels, _, width = x_PKW.shape
    out = torch.empty(panels, weights.rows, width, dtype=torch.bfloat16, device="cpu") if out is None else out
    if out.numel():
        threads = torch.get_num_threads()
        key = (panels, width, used, activation, out.dtype, threads, weights.addresses)
        if (plan := weights.plans.get(key)) is None:
            plan = plan_narrow(
                weights, panels=panels, width=width, used=used, activation=activation, out_dtype=out.dtype,
                threads=threads,
            )  # fmt: skip
            remember(weights, key, plan)
        plan.run(x_PKW.data_ptr(), out.data_ptr(), 0 if bias_M is None else bias_M.data_ptr())
    return out


def _check_tensors(weights: Narrow, x: Tensor, bias: Tensor | None, out: Tensor | None) -> None:
    _need("x", x, (torch.bfloat16,), f"[P, {weights.cols}, W]", x.dim() == 3 and x.shape[1] == weights.cols)
    need_bias(weights.rows, bias)
    if out is not None:
        shape = (x.shape[0], weights.rows, x.shape[2])
        _need("out", out, (torch.bfloat16, torch.float32), str(list(shape)), tuple(out.shape) == shape)
        x_end, out_end = (t.data_ptr() + t.numel() * t.element_size() for t in (x, out))
        if x.data_ptr() < out_end and out.data_ptr() < x_end:
            raise FormatError("out overlaps x, which is still read while out is written; give it memory of its own")


def _need(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: str, fits: bool) -> None:
    if not fits or tensor.dtype not in dtypes or not tensor.is_contiguous() or not tensor.is_cpu:
        kinds = " or ".join(str(kind) for kind in dtypes)
        raise FormatError(
            f"{name} must be a contiguous {kinds} CPU tensor {shape}, got {tensor.dtype} {tuple(tensor.shape)} on "
            f"{tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
        )
