"""Convolutions by sparse weights on the CPU, without im2col.

Shapes: M output channels, C input channels, H and W height and width, E stored entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import activation_code, need_bias, need_floats, output
from gossamer.kernels.cpu.plan import LINES, Image, Layout, known, make_plan, run
from gossamer.kernels.cpu.stream import Stream

# A panel of image lines may fill a quarter of a second-level cache of 1 MiB.
_PANEL_BYTES = 1 << 18


def spmm_conv(
    stream: Stream,
    x_CHW: Tensor,
    kernel: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    bias_M: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """Convolve with stride 1, without im2col: every kept weight is one offset into the padded image.

    Args:
        stream: weights [M, C * kernel height * kernel width], columns in the order of a flattened conv weight.
        x_CHW: float32 [C, H, W] or [images, C, H, W], contiguous.
        kernel: height and width of the kernel.
        padding: zeros added above and below, left and right.
        bias_M: float32 [M].
        activation: as in `spmm`.
        out: where to write; made when None.

    Raises:
        FormatError: a shape, dtype or layout does not fit.
        UnknownName: no such activation.

    Example:
        >>> y = spmm_conv(weights, image, (3, 3), (1, 1), bias, "relu")
    """
    code = activation_code(activation)
    need_bias(stream.rows, bias_M)
    (kh, kw), (ph, pw) = kernel, padding
    channels, rest = divmod(stream.cols, kh * kw)
    fits = x_CHW.dim() in (3, 4) and rest == 0 and x_CHW.shape[-3] == channels
    need_floats("x", x_CHW, f"[..., {stream.cols}/({kh}*{kw}), H, W]", fits)
    high, wide = x_CHW.shape[-2:]
    out_high, out_wide = high + 2 * ph - kh + 1, wide + 2 * pw - kw + 1
    if out_high <= 0 or out_wide <= 0 or min(ph, pw) < 0:
        raise FormatError(f"a {kh}x{kw} kernel does not fit into {high}x{wide} pixels padded by {ph} and {pw}")
    out = output(out, (*x_CHW.shape[:-3], stream.rows, out_high, out_wide))
    if out.numel():
        images, threads = x_CHW.shape[0] if x_CHW.dim() == 4 else 1, torch.get_num_threads()
        key = (LINES, images, high, wide, kernel, padding, code, threads)
        if (plan := known(stream, key)) is None:
            image, size = _image(stream, kernel, padding, high, wide), 4 * out_high * out_wide
            layout = Layout(
                out_high, LINES, 4 * high * wide, LINES, size, images,
                4 * high * wide * channels, size * stream.rows, image,
            )  # fmt: skip
            plan = make_plan(stream, key, layout, code, threads)
        run(plan, x_CHW.data_ptr(), out.data_ptr(), bias_M)
    return out


def _image(stream: Stream, kernel: tuple[int, int], padding: tuple[int, int], high: int, wide: int) -> Image:
    """Choose how many lines a panel holds, and give every entry its offset into such a panel."""
    (kh, kw), (ph, pw) = kernel, padding
    channels, line, out_high = stream.cols // (kh * kw), wide + 2 * pw, high + 2 * ph - kh + 1
    room = _PANEL_BYTES // (4 * channels * line) - (kh - 1)
    panels = -(-out_high // max(1, min(out_high, room)))
    panel_lines = -(-out_high // panels)
    floats = -(-((panel_lines + kh - 1) * line + pw) // 16) * 16
    key = (kernel, line, floats)
    if (offsets_E := stream.offsets_by_geometry.get(key)) is None:
        column_E = stream.indices_E.to(torch.int32)
        place_E = column_E % (kh * kw)
        offsets_E = (column_E // (kh * kw)) * floats + (place_E // kw) * line + place_E % kw
        stream.offsets_by_geometry[key] = offsets_E = offsets_E.to(torch.int32).contiguous()
    kept = wide + 2 * pw - kw + 1
    return Image(offsets_E, channels, panel_lines, line, kept, floats, kh - 1, high, wide, ph, pw)
