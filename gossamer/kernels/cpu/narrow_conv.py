"""Convolutions by sparse bfloat16 weights without im2col: stride 1, padding that keeps the size.

An image lies with its zero border in place, line after line, so that every kept weight (o, c, kh, kw) reads one run of
positions from c * plane + kh * line + kw on, and the product on panels serves as it is. What it computes for positions
of the border is masked out, so that the output has its border, too, and can be the next layer's input.

Shapes: C input channels, M output channels, positions as in `Bordered`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.formats import CSR, RowGrouped
from gossamer.kernels.cpu.checks import activation_code
from gossamer.kernels.cpu.launch import Launch
from gossamer.kernels.cpu.narrow import Narrow, narrow
from gossamer.kernels.cpu.narrow_panels import OUTPUTS, lay_out
from gossamer.kernels.cpu.target import lanes

_LINE = 32
_SLACK = 16


@dataclass(frozen=True)
class Bordered:
    """Where the pixels of an image with a border of `border` zeros lie: `high` x `wide` of them, per channel.

    Example:
        >>> place = Bordered(28, 28, 1)
        >>> place.line, place.plane
        (30, 928)
    """

    high: int
    wide: int
    border: int

    @property
    def line(self) -> int:
        """Positions from one line to the next."""
        return self.wide + 2 * self.border

    @property
    def plane(self) -> int:
        """Positions from one channel to the next: whole cache lines, and room for the last vector to read on."""
        return -(-((self.high + 2 * self.border) * self.line + _SLACK) // _LINE) * _LINE

    @property
    def span(self) -> int:
        """Positions from the first pixel to the last, the borders between lines among them."""
        return self.high * self.line - 2 * self.border

    def empty(self, channels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """An image of zeros [channels, plane]."""
        return torch.zeros(channels, self.plane, dtype=dtype, device="cpu")

    def pixels(self, image_CP: Tensor) -> Tensor:
        """A view of the pixels, [channels, high, wide]."""
        inner = image_CP[:, : (self.high + 2 * self.border) * self.line].unflatten(1, (-1, self.line))
        return inner[:, self.border : self.border + self.high, self.border : self.border + self.wide]

    def mask(self) -> Tensor:
        """int32 over the span's vectors: -1 at pixels, 0 at the border."""
        positions = torch.arange(-(-self.span // _SLACK) * _SLACK)
        return -((positions % self.line < self.wide) & (positions < self.span)).int()


def narrow_convolution(fmt: CSR | RowGrouped, place: Bordered) -> Narrow:
    """Arrange bfloat16 weights [M, C k k] (k = 2 border + 1) for images that lie as `place` says.

    Raises:
        FormatError: the columns are no C k k, or what `narrow` refuses.

    Example:
        >>> weights = narrow_convolution(RowGrouped.from_dense(w_MCkk.flatten(1).bfloat16()), Bordered(28, 28, 1))
    """
    size = 2 * place.border + 1
    if fmt.cols % size**2:
        raise FormatError(f"a {size}x{size} kernel has a multiple of {size**2} columns, the weight has {fmt.cols}")
    weights = narrow(fmt)
    column = weights.indices_Rd.to(torch.int64)
    channel, high, wide = column // size**2, column // size % size, column % size
    return replace(weights, indices_Rd=(channel * place.plane + high * place.line + wide).to(torch.int32))


def plan_narrow_convolution(
    weights: Narrow,
    place: Bordered,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    threads: int,
) -> Launch:
    """Lay out y = act(W * x + b) on one image x [C, plane], y [M, plane], both as `place` says.

    The plan runs on the addresses of x (bfloat16), y and bias (float32, 0 for none). Of y only what lies between the
    first pixel and the last is written; its border must be zero before, and is zero after.

    Args:
        weights: of `narrow_convolution` for the same place.
        activation: as in `plan_panels`.
        out_dtype: of y, bfloat16 or float32.
        threads: at most this many.

    Example:
        >>> plan = plan_narrow_convolution(weights, Bordered(28, 28, 1), activation="relu", threads=1)
        >>> plan.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    """
    if weights.dtype != torch.bfloat16 or out_dtype not in OUTPUTS[torch.bfloat16]:
        raise FormatError(f"convolutions read bfloat16 and write it or float32, got {weights.dtype} to {out_dtype}")
    size = out_dtype.itemsize
    shift = size * place.border * (place.line + 1)
    strides = (2, size * place.plane, 0, 0, 0)
    vectors = [-(-place.span // lanes())]
    code = activation_code(activation)
    return lay_out(weights, vectors, strides, code, size, threads, shift=shift, mask=place.mask())
