"""Sparse weights times dense activations on the CPU: y = act(x Wᵀ + b), and the same for images and columns.

Shapes: T tokens, K inputs, M outputs, N columns (pixels), C channels, H and W image height and width, E entries.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gossamer.core.errors import FormatError, unknown
from gossamer.kernels.cpu.stream import GROUPS, Stream
from gossamer.kernels.cpu.target import lanes
from gossamer.kernels.cpu.workplace import workplace

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_ROW_MAJOR, _COLUMN_MAJOR, _PANEL_MAJOR, _LINES = range(4)
# The arguments of one call come first, then those of a plan (see `panels.SLOT` and its neighbours).
_pack_into = struct.Struct("=6q280s").pack_into
_pack_plan = struct.Struct("=35q").pack
# Plans kept per weight; serving many different sizes of x starts over beyond this.
_MOST_PLANS = 128
# Multiply-adds that pay for waking one more thread: about ten microseconds of work.
GRAIN = 500_000
# Rows that a kernel finishes together (`panels.BATCH`): wide enough that y is written in runs of four cache lines.
_BATCH = 64

# A panel of image lines may fill a quarter of a second-level cache of 1 MiB.
_PANEL_BYTES = 1 << 18

# Constants whose addresses kernels receive: a zero bias, and the lower bounds "none" and "relu".
_ZEROS = torch.zeros(16)
_BOUNDS = torch.tensor([-torch.inf, 0.0])
_ZERO_AT, _BOUND_AT = _ZEROS.data_ptr(), _BOUNDS.data_ptr()


_kernels: dict[tuple[int, int], object] = {}
_widest: dict[int, int] = {}


def _kernel(g: int, index_bytes: int):
    """The compiled kernel; Numba is imported here, on first use."""
    found = _kernels.get((g, index_bytes))
    if found is None:
        from gossamer.kernels.cpu import panels

        _widest[g] = panels.widest(g)
        found = _kernels[g, index_bytes] = panels.kernel(g, index_bytes)
    return found


def warm_up(*, groups: tuple[int, ...] = GROUPS) -> None:
    """Compile every sparse product for these group sizes now, rather than on first use."""
    for g in groups:
        for index_bytes in (2, 4):
            _kernel(g, index_bytes)


@dataclass(frozen=True)
class Panels:
    """Activations kept in the layout that kernels read: [panels, features, width] floats, token t of panel p at
    lane t - p * width. Passing them between layers skips two transposes per layer.

    Args:
        data: float32 [ceil(tokens / width), features, width]; lanes beyond the last token are undefined.
        tokens: T.
    """

    data: Tensor
    tokens: int

    @property
    def features(self) -> int:
        """Features per token."""
        return self.data.shape[1]

    def rows(self) -> Tensor:
        """The same activations as an ordinary [T, features] tensor."""
        return self.data.permute(0, 2, 1).reshape(-1, self.features)[: self.tokens].contiguous()


def panel_width() -> int:
    """Tokens of one panel of `Panels` on this processor: four vectors."""
    return 4 * lanes()


def _chunks(places: int, batches: int, threads: int) -> int:
    """Into how many chunks of rows each panel is cut, so that no thread waits for long; 1 packs every panel once."""
    if threads == 1 or places == 0:
        return 1
    for chunks in range(1, 4 * threads):
        tasks = places * chunks
        if -(-tasks // threads) * threads <= 1.15 * tasks:
            return max(1, min(chunks, batches))
    return max(1, min(threads, batches))


@dataclass(frozen=True)
class _Image:
    """How a convolution reads its input: panels of whole padded lines, `floats` a channel, and offsets into them."""

    offsets_E: Tensor
    channels: int
    panel_lines: int
    line: int
    line_kept: int
    floats: int
    halo: int
    high: int
    wide: int
    pad_high: int
    pad_wide: int


@dataclass(frozen=True)
class _Layout:
    """How x and y lie in memory; strides are in bytes. A convolution's tokens are the lines of its output."""

    tokens: int
    x_kind: int
    x_row: int
    y_kind: int
    y_row: int
    images: int = 1
    x_image: int = 0
    y_image: int = 0
    image: _Image | None = None


@dataclass(frozen=True)
class _Plan:
    """Work laid out for one size of x: the kernel, its fixed arguments, and what each call must bring."""

    entry: object
    threads: int
    scratch_bytes: int
    fixed: bytes
    addresses: tuple[int, int, int]


def _known(stream: Stream, key: tuple) -> _Plan | None:
    """The plan made earlier for this size of x, unless the weights have moved in memory since."""
    plan = stream.plans.get(key)
    return plan if plan is not None and plan.addresses == stream.addresses else None


def _plan(stream: Stream, key: tuple, layout: _Layout, code: int, threads: int) -> _Plan:
    """Cut the work into tasks (images x panels x chunks of rows) and size every thread's scratch memory."""
    starts_at, indices_at, values_at = stream.addresses
    index_bytes, unit, image = 2 if stream.indices_E.dtype is torch.uint16 else 4, panel_width() * 4, layout.image
    columns, positions, width = stream.cols, layout.tokens, lanes()
    if image is not None:
        indices_at, index_bytes, unit = image.offsets_E.data_ptr(), 4, 4
        columns, positions = image.channels, layout.tokens * image.line
    entry, most = _kernel(stream.g, index_bytes), _widest[stream.g]
    in_panels = _PANEL_MAJOR in (layout.x_kind, layout.y_kind)
    if in_panels:
        # Tiles must not straddle two panels of four vectors.
        most = 1 << (min(4, most).bit_length() - 1)
    vectors = -(-positions // width)
    panels = -(-vectors // most) if image is None else -(-layout.tokens // image.panel_lines)
    wide = most if in_panels or image is not None else -(-vectors // panels)
    batches = -(-stream.rows // _BATCH)
    threads = max(1, min(threads, stream.values_EG.numel() * positions * layout.images // GRAIN))
    chunks = _chunks(panels * layout.images, batches, threads)
    tasks = panels * layout.images * chunks
    packed = 0 if layout.x_kind == _PANEL_MAJOR else 4 * columns * (image.floats if image else width * wide)
    # The last tile of an image reads, and drops, up to one tile beyond its panel.
    packed = -(-packed // 64) * 64 + (4 * width * wide if image else 0)
    sums = 4 * _BATCH * width * wide
    hold = sums if stream.blocks > 1 else 0
    each = packed + max(sums, hold * -(-batches // chunks)) + 64
    lines = (0,) * 9 if image is None else tuple(getattr(image, field.name) for field in fields(image)[2:])
    fixed = _pack_plan(
        tasks, chunks, panels, each,
        layout.x_kind, layout.y_kind, layout.x_row, layout.x_image, layout.y_row, layout.y_image,
        layout.tokens, stream.rows, columns, stream.groups, stream.blocks, starts_at, indices_at, values_at,
        code, _BOUND_AT + 4 * (code == 1), _ZERO_AT,
        wide, panel_width() // width, unit, packed, hold, *lines,
    )  # fmt: skip
    threads = min(threads, tasks)
    if len(stream.plans) >= _MOST_PLANS:
        stream.plans.clear()
    plan = stream.plans[key] = _Plan(entry, threads, each * threads, fixed, stream.addresses)
    return plan


def _run(plan: _Plan, x_at: int, y_at: int, bias_M: Tensor | None) -> None:
    place = workplace
    scratch_at = place.scratch_of(plan.scratch_bytes)
    bias_at = 0 if bias_M is None else bias_M.data_ptr()
    _pack_into(place.args, 0, 0, 0, scratch_at, x_at, y_at, bias_at, plan.fixed)
    plan.entry.run(place.args_at, plan.threads)


def activation_code(activation: str) -> int:
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise unknown("activation", activation, ACTIVATIONS)
    return code


def need_floats(name: str, tensor: Tensor, shape: str, fits: bool) -> None:
    """Refuse what the kernels cannot read: they take raw addresses."""
    if not fits or tensor.dtype is not torch.float32 or not tensor.is_contiguous() or not tensor.is_cpu:
        raise FormatError(
            f"{name} must be a contiguous float32 CPU tensor {shape}, got {tensor.dtype} {tuple(tensor.shape)} "
            f"on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}; call .float().contiguous()"
        )


def _bias(stream: Stream, bias_M: Tensor | None) -> None:
    if bias_M is not None:
        need_floats("bias", bias_M, f"[{stream.rows}]", bias_M.shape == (stream.rows,))


def _output(out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if out is None:
        return torch.empty(shape)
    need_floats("out", out, str(list(shape)), tuple(out.shape) == shape)
    return out


def spmm(
    stream: Stream,
    x_TK: Tensor | Panels,
    bias_M: Tensor | None = None,
    activation: str = "none",
    out: Tensor | Panels | None = None,
) -> Tensor | Panels:
    """Multiply activations by sparse weights: y = act(x Wᵀ + b).

    Args:
        stream: the weights W [M, K].
        x_TK: float32 [T, K], contiguous, any T >= 0; or the `Panels` of an earlier layer.
        bias_M: float32 [M].
        activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        out: where to write, [T, M] or `Panels`; made when None, in the layout of x.

    Raises:
        FormatError: a shape, dtype or layout does not fit; the message says which.
        UnknownName: no such activation.

    Example:
        >>> y = spmm(weights, torch.randn(12, 384), activation="relu")
    """
    code = activation_code(activation)
    _bias(stream, bias_M)
    x_at, x_kind, tokens = _input(stream, x_TK)
    if out is None and x_kind == _PANEL_MAJOR:
        out = empty_panels(tokens, stream.rows)
    if isinstance(out, Panels):
        y_at, y_kind = _panel_output(stream, out, tokens), _PANEL_MAJOR
    else:
        out = _output(out, (tokens, stream.rows))
        y_at, y_kind = out.data_ptr(), _ROW_MAJOR
    if tokens and stream.rows:
        threads = torch.get_num_threads()
        key = (x_kind, y_kind, tokens, code, threads)
        if (plan := _known(stream, key)) is None:
            y_row = 4 * (stream.rows if y_kind == _ROW_MAJOR else panel_width())
            plan = _plan(stream, key, _Layout(tokens, x_kind, 4 * stream.cols, y_kind, y_row), code, threads)
        _run(plan, y_at=y_at, x_at=x_at, bias_M=bias_M)
    return out


def _input(stream: Stream, x_TK: Tensor | Panels) -> tuple[int, int, int]:
    """Address, kind and tokens of x."""
    if isinstance(x_TK, Panels):
        data, width = x_TK.data, panel_width()
        shape = (-(-x_TK.tokens // width), stream.cols, width)
        need_floats("x", data, str(list(shape)), tuple(data.shape) == shape)
        return data.data_ptr(), _PANEL_MAJOR, x_TK.tokens
    shape = x_TK.shape
    need_floats("x", x_TK, f"[T, {stream.cols}]", len(shape) == 2 and shape[1] == stream.cols)
    return x_TK.data_ptr(), _ROW_MAJOR, shape[0]


def empty_panels(tokens: int, features: int) -> Panels:
    """Uninitialised `Panels` for [tokens, features] activations."""
    width = panel_width()
    return Panels(torch.empty(-(-tokens // width), features, width), tokens)


def _panel_output(stream: Stream, out: Panels, tokens: int) -> int:
    """Address of the panels to write, once they are seen to fit."""
    shape = (-(-tokens // panel_width()), stream.rows, panel_width())
    need_floats("out", out.data, str(list(shape)), tuple(out.data.shape) == shape and out.tokens == tokens)
    return out.data.data_ptr()


def spmm_columns(
    stream: Stream,
    x_KN: Tensor,
    bias_M: Tensor | None = None,
    activation: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """Multiply sparse weights by columns: Y = act(W X + b), the product of a 1x1 convolution.

    Args:
        stream: the weights W [M, K].
        x_KN: float32 [K, N] or [images, K, N], contiguous.
        bias_M: float32 [M].
        activation: as in `spmm`.
        out: where to write, [M, N] or [images, M, N]; made when None.

    Raises:
        FormatError: a shape, dtype or layout does not fit.
        UnknownName: no such activation.

    Example:
        >>> y = spmm_columns(weights, image.reshape(512, 14 * 14), bias, "relu")
    """
    code = activation_code(activation)
    _bias(stream, bias_M)
    need_floats("x", x_KN, f"[..., {stream.cols}, N]", x_KN.dim() in (2, 3) and x_KN.shape[-2] == stream.cols)
    count, images = x_KN.shape[-1], x_KN.shape[0] if x_KN.dim() == 3 else 1
    out = _output(out, (*x_KN.shape[:-2], stream.rows, count))
    if out.numel():
        threads = torch.get_num_threads()
        key = (_COLUMN_MAJOR, images, count, code, threads)
        if (plan := _known(stream, key)) is None:
            row = 4 * count
            layout = _Layout(
                count, _COLUMN_MAJOR, row, _COLUMN_MAJOR, row, images, row * stream.cols, row * stream.rows
            )
            plan = _plan(stream, key, layout, code, threads)
        _run(plan, x_KN.data_ptr(), out.data_ptr(), bias_M)
    return out


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
    _bias(stream, bias_M)
    (kh, kw), (ph, pw) = kernel, padding
    channels, rest = divmod(stream.cols, kh * kw)
    fits = x_CHW.dim() in (3, 4) and rest == 0 and x_CHW.shape[-3] == channels
    need_floats("x", x_CHW, f"[..., {stream.cols}/({kh}*{kw}), H, W]", fits)
    high, wide = x_CHW.shape[-2:]
    out_high, out_wide = high + 2 * ph - kh + 1, wide + 2 * pw - kw + 1
    if out_high <= 0 or out_wide <= 0 or min(ph, pw) < 0:
        raise FormatError(f"a {kh}x{kw} kernel does not fit into {high}x{wide} pixels padded by {ph} and {pw}")
    out = _output(out, (*x_CHW.shape[:-3], stream.rows, out_high, out_wide))
    if out.numel():
        images, threads = x_CHW.shape[0] if x_CHW.dim() == 4 else 1, torch.get_num_threads()
        key = (_LINES, images, high, wide, kernel, padding, code, threads)
        if (plan := _known(stream, key)) is None:
            image, size = _image(stream, kernel, padding, high, wide), 4 * out_high * out_wide
            layout = _Layout(
                out_high, _LINES, 4 * high * wide, _LINES, size, images,
                4 * high * wide * channels, size * stream.rows, image,
            )  # fmt: skip
            plan = _plan(stream, key, layout, code, threads)
        _run(plan, x_CHW.data_ptr(), out.data_ptr(), bias_M)
    return out


def _image(stream: Stream, kernel: tuple[int, int], padding: tuple[int, int], high: int, wide: int) -> _Image:
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
    return _Image(offsets_E, channels, panel_lines, line, kept, floats, kh - 1, high, wide, ph, pw)
