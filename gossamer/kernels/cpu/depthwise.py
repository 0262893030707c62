"""Depthwise convolutions on image planes: every channel by its own small dense kernel.

Shapes: N images, C channels, H and W height and width, S floats from plane to plane.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.bands import Bands, Part, lines_read
from gossamer.kernels.cpu.checks import need_bias, need_counts, need_floats, output
from gossamer.kernels.cpu.conv_plan import bounds_of, laid_out, run_on, shares, zeros_at
from gossamer.kernels.cpu.launch import Launch
from gossamer.kernels.cpu.planes import plane_stride
from gossamer.kernels.cpu.window import Window

# Which vector code: down the lines with stride 1 or 2, several lines in a vector, pixels one after the other in a few
# vectors, or any window tap by tap.
WALK, STRIDE, FOLD, FLAT, SLIDE = range(5)
# `flat` is compiled for one size of image of so few vectors: where there are many planes of it.
_FEW, _MANY = 4, 64
# Larger kernels take so long to begin a plane that threads take planes rather than lines (measured).
_BANDED_TAPS = 9
# Planes between the one that is convolved and the one whose edges are asked for (2 and 4 measured alike).
_AHEAD = 4


@dataclass(frozen=True)
class _Way:
    """The vector code for a window on an image: what is compiled in."""

    how: int
    kernel: int  # for `slide` whether columns follow each other
    left: int
    right: int
    narrow: int
    adding: int
    sizes: tuple[int, ...] = ()  # for `flat`


def _way(window: Window, planes: int, high: int, wide: int, adding: bool) -> _Way:
    """`flat` or `fold` for narrow images, `walk` or `stride` where the window allows it, `slide` otherwise."""
    from gossamer.kernels.cpu.target import lanes

    (kh, kw), (top, left, bottom, right) = window.kernel, window.padding
    out_high, out_wide = window.output(high, wide)
    plain = kh == kw and kw in (3, 5) and window.dilation == (1, 1) and max(top, left, bottom, right) < kh
    if plain and window.stride == (1, 1) and wide == out_wide and 2 * wide <= lanes():
        if planes >= _MANY and max(high, out_high) * wide <= _FEW * lanes():
            return _Way(FLAT, kw, 0, 0, 0, int(adding), (high, wide, out_high, top, left))
        return _Way(FOLD, kw, 0, 0, 0, int(adding))
    # A last vector that begins (or a first one that ends) within the padding's reach of the edge needs more masks.
    narrow, rest = out_wide < lanes(), out_wide % lanes()
    steps = [(1, 1)]
    if left <= 2 and kw - left <= 4:
        # Taps of `stride` stand at most one output aside.
        steps.append((2, 2))
    if plain and window.stride in steps and (narrow or rest == 0 or rest >= max(left, right)):
        whole_lines = narrow + (narrow and wide <= lanes())
        return _Way(WALK if window.stride == (1, 1) else STRIDE, kw, left, right, whole_lines, int(adding))
    return _Way(SLIDE, int(window.stride[1] == 1), 0, 0, 0, int(adding))


def plan_depthwise(
    weight_CHW: Tensor,
    images: int,
    high: int,
    wide: int,
    window: Window,
    *,
    activation: str = "none",
    residual: bool = False,
    threads: int = 1,
    strides: tuple[int, int] | None = None,
) -> Launch:
    """Lay out act(depthwise(x) + bias + residual) on image planes; run it with addresses x, y, bias[, residual].

    Args:
        weight_CHW: float32 [C, kernel height, kernel width]; copied.
        images: N.
        high, wide: H and W of x.
        window: stride, padding and dilation; its kernel is the weight's.
        activation: "none", "relu", "relu6", "silu", "hard_swish", "gelu" or "gelu_tanh".
        residual: whether a fourth address brings planes to add, of the size of y but not y itself; bias may be 0.
        threads: how many may work.
        strides: floats from plane to plane of x and of y (and the residual); `plane_stride` of their pixels if None.

    Raises:
        FormatError: the weight does not fit the window, or the window the image.
        UnknownName: no such activation.

    Example:
        >>> launch = plan_depthwise(weight, 1, 56, 56, Window((3, 3), padding=(1, 1, 1, 1)), activation="relu6")
        >>> launch.run(x.data_ptr(), y.data_ptr(), bias.data_ptr())
    """
    from gossamer.kernels.cpu.target import lanes

    need_counts(images=images)
    _need_weight(weight_CHW, window)
    (out_high, out_wide), channels = window.output(high, wide), weight_CHW.shape[0]
    x_plane, y_plane = strides or (plane_stride(high * wide), plane_stride(out_high * out_wide))
    weight = weight_CHW.detach().to(torch.float32).contiguous().clone()
    code, low_at, high_at = bounds_of(activation)
    planes = images * channels
    work = planes * window.taps * out_high * out_wide
    threads, tasks = shares(planes, window.taps * out_high * out_wide, threads)
    nothing = torch.zeros(wide, dtype=torch.float32, device="cpu")
    way = _way(window, planes, high, wide, residual)
    masks, scratch, room = _folded(window, wide, out_high) if way.how == FOLD else (nothing, 0, 0)

    vectors, unit = -(-out_high * out_wide // lanes()), lanes() if way.how == FLAT else out_wide

    def numbers(
        tasks: int, high: int, out_high: int, top: int, begin: int = 0, end: int = vectors,
        head: int = 0, tail: int = 0, skew: int = 0,
    ) -> tuple[int, ...]:  # fmt: skip
        return (
            tasks, planes, channels, weight.data_ptr(), window.taps, 4 * x_plane, 4 * y_plane,
            high, wide, out_high, out_wide, *window.kernel, *window.stride, *window.dilation, top, window.padding[1],
            code, low_at, high_at, zeros_at(), nothing.data_ptr(), scratch, room, masks.data_ptr(), lanes() // wide,
            begin, end, 4 * x_plane * _AHEAD, head, tail, skew,
        )  # fmt: skip

    def part(first: int, last: int) -> Part:
        if way.how == FLAT:
            return Part(numbers(1, high, out_high, window.padding[0], first // lanes(), -(-last // lanes())))
        l0, l1 = first // out_wide, last // out_wide
        begin, end = lines_read(window, high, l0, l1)
        top, shift = begin - (l0 * window.stride[0] - window.padding[0]), 4 * first
        # What another thread may have written: a line of the window's overlap, and a vector of a product.
        edge = min(4 * (wide + lanes()), 4 * wide * (end - begin))
        # Bands begin with different planes: threads that write one cache line at the same time wait for each other.
        skew = planes * first // (out_high * out_wide)
        head, tail = edge * (begin > 0), edge * (end < high)
        fixed = numbers(1, end - begin, l1 - l0, top, head=head, tail=tail, skew=skew)
        return Part(fixed, (4 * wide * begin, shift, 0, shift))

    return laid_out(
        _kernel(way),
        addresses=3 + residual,
        absent=1 - residual,
        fixed=numbers(tasks, high, out_high, window.padding[0]),
        threads=threads,
        scratch_bytes=scratch * threads,
        holds=(weight, nothing, masks),
        bands=Bands(work, out_high * out_wide, unit, scratch, part)
        if images == 1 and window.taps <= _BANDED_TAPS
        else None,
    )


def _need_weight(weight_CHW: Tensor, window: Window) -> None:
    fits = weight_CHW.dim() == 3 and tuple(weight_CHW.shape[1:]) == window.kernel
    if (
        not fits
        or not weight_CHW.is_cpu
        or not weight_CHW.is_floating_point()
        or weight_CHW.layout is not torch.strided
    ):
        raise FormatError(
            f"the weight must be floats [C, {window.kernel[0]}, {window.kernel[1]}] on the CPU, "
            f"got {weight_CHW.dtype} {tuple(weight_CHW.shape)} on {weight_CHW.device}"
        )


def _folded(window: Window, wide: int, out_high: int) -> tuple[Tensor, int, int]:
    """Of `fold`: the lanes whose column is real for each kx, and bytes of scratch memory of a thread and of a plane."""
    from gossamer.kernels.cpu.depthwise_kernel import BATCH
    from gossamer.kernels.cpu.target import lanes

    together, (kh, kw) = lanes() // wide, window.kernel
    column, lane = torch.arange(together * wide) % wide, torch.arange(together * wide)
    seen = column + torch.arange(kw)[:, None] - window.padding[1]
    masks = (((seen >= 0) & (seen < wide)).long() << lane).sum(1)
    # The last vector reads whole lines beyond the last line of the padded plane.
    floats = (-(-out_high // together) * together + kh + 1) * wide + 2 * lanes()
    room = -(-floats // 16) * 64
    return masks, 64 + BATCH * room, room


@functools.cache
def _kernel(way: _Way):
    from gossamer.kernels.cpu.depthwise_kernel import flat_kernel, fold_kernel, slide_kernel, walk_kernel

    if way.how == FLAT:
        return flat_kernel(way.kernel, *way.sizes, way.adding)
    if way.how == FOLD:
        return fold_kernel(way.kernel, way.adding)
    if way.how == SLIDE:
        return slide_kernel(way.kernel, way.adding)
    return walk_kernel(1 + (way.how == STRIDE), way.kernel, way.left, way.right, way.narrow, way.adding)


def depthwise(
    weight_CHW: Tensor,
    x_NCHW: Tensor,
    window: Window,
    bias_C: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve every channel of ordinary images by its own kernel: act(depthwise(x) + bias + residual).

    Args:
        weight_CHW: float32 [C, kernel height, kernel width].
        x_NCHW: float32 [C, H, W] or [N, C, H, W], contiguous.
        window: kernel, stride, padding, dilation.
        bias_C: float32 [C].
        activation: as in `plan_depthwise`.
        residual: added before the activation, in the shape of the result; not `out` itself.
        out: where to write; made when None. It may not overlap x.

    Raises:
        FormatError: a shape, dtype, layout or overlap does not fit.
        UnknownName: no such activation.

    Example:
        >>> y = depthwise(torch.randn(8, 3, 3), torch.randn(8, 20, 20), Window((3, 3), padding=(1, 1, 1, 1)))
    """
    _need_weight(weight_CHW, window)
    channels = weight_CHW.shape[0]
    fits = x_NCHW.dim() in (3, 4) and x_NCHW.shape[-3] == channels
    need_floats("x", x_NCHW, f"[..., {channels}, H, W]", fits)
    high, wide = x_NCHW.shape[-2:]
    need_bias(channels, bias_C)
    out_high, out_wide = window.output(high, wide)
    out = output(out, (*x_NCHW.shape[:-2], out_high, out_wide), (x_NCHW, bias_C, residual))
    if residual is not None:
        need_floats("residual", residual, str(list(out.shape)), residual.shape == out.shape)
    if out.numel():
        images = x_NCHW.shape[0] if x_NCHW.dim() == 4 else 1
        plan = plan_depthwise(
            weight_CHW, images, high, wide, window, activation=activation, residual=residual is not None,
            threads=torch.get_num_threads(), strides=(high * wide, out_high * out_wide),
        )  # fmt: skip
        run_on(plan, x_NCHW, out, bias_C, residual)
    return out
