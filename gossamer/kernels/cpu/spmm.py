"""Sparse weights times dense activations on the CPU: y = act(x Wᵀ + b), for rows, columns and panels.

Shapes: T tokens, K inputs, M outputs, N columns (pixels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.errors import FormatError
from gossamer.kernels.cpu.checks import activation_code, need_apart, need_bias, need_floats, output
from gossamer.kernels.cpu.plan import (
    COLUMN_MAJOR,
    PANEL_MAJOR,
    ROW_MAJOR,
    Layout,
    known,
    make_plan,
    panel_width,
    run,
)
from gossamer.kernels.cpu.stream import Stream


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
        activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".
        out: where to write, [T, M] or `Panels`; made when None, in the layout of x. It may not overlap x.

    Raises:
        FormatError: a shape, dtype, layout or overlap does not fit; the message says which.
        UnknownName: no such activation.

    Example:
        >>> y = spmm(weights, torch.randn(12, 384), activation="relu")
    """
    code = activation_code(activation)
    _refuse_order(stream)
    need_bias(stream.rows, bias_M)
    x_at, x_kind, tokens = _input(stream, x_TK)
    if out is None and x_kind == PANEL_MAJOR:
        out = empty_panels(tokens, stream.rows)
    if isinstance(out, Panels):
        y_at, y_kind = _panel_output(stream, out, tokens, x_TK, bias_M), PANEL_MAJOR
    else:
        out = output(out, (tokens, stream.rows), (_memory(x_TK), bias_M))
        y_at, y_kind = out.data_ptr(), ROW_MAJOR
    if tokens and stream.rows:
        threads = torch.get_num_threads()
        key = (x_kind, y_kind, tokens, code, threads)
        if (plan := known(stream, key)) is None:
            y_row = 4 * (stream.rows if y_kind == ROW_MAJOR else panel_width())
            plan = make_plan(stream, key, Layout(tokens, x_kind, 4 * stream.cols, y_kind, y_row), code, threads)
        run(plan, y_at=y_at, x_at=x_at, bias_M=bias_M)
    return out


def _refuse_order(stream: Stream) -> None:
    if stream.order_M is not None:
        raise FormatError(
            "spmm writes rows as they are stored, these have another order; multiply replace(stream, order_M=None) and "
            "gather, or take spmm_panels or sparse_conv"
        )


def _input(stream: Stream, x_TK: Tensor | Panels) -> tuple[int, int, int]:
    """Address, kind and tokens of x."""
    if isinstance(x_TK, Panels):
        data, width = x_TK.data, panel_width()
        shape = (-(-x_TK.tokens // width), stream.cols, width)
        need_floats("x", data, str(list(shape)), tuple(data.shape) == shape)
        return data.data_ptr(), PANEL_MAJOR, x_TK.tokens
    shape = x_TK.shape
    need_floats("x", x_TK, f"[T, {stream.cols}]", len(shape) == 2 and shape[1] == stream.cols)
    return x_TK.data_ptr(), ROW_MAJOR, shape[0]


def empty_panels(tokens: int, features: int) -> Panels:
    """Uninitialised `Panels` for [tokens, features] activations."""
    width = panel_width()
    data = torch.empty(-(-tokens // width), features, width, dtype=torch.float32, device="cpu")
    return Panels(data, tokens)


def _memory(x: Tensor | Panels) -> Tensor:
    return x.data if isinstance(x, Panels) else x


def _panel_output(stream: Stream, out: Panels, tokens: int, x: Tensor | Panels, bias_M: Tensor | None) -> int:
    """Address of the panels to write, once they are seen to fit."""
    shape = (-(-tokens // panel_width()), stream.rows, panel_width())
    need_floats("out", out.data, str(list(shape)), tuple(out.data.shape) == shape and out.tokens == tokens)
    need_apart(out.data, (_memory(x), bias_M))
    return out.data.data_ptr()


def spmm_columns(
    stream: Stream,
    x_KN: Tensor | Panels,
    bias_M: Tensor | None = None,
    activation: str = "none",
    out: Tensor | Panels | None = None,
) -> Tensor | Panels:
    """Multiply sparse weights by columns: Y = act(W X + b), the product of a 1x1 convolution.

    Args:
        stream: the weights W [M, K].
        x_KN: float32 [K, N] or [images, K, N], contiguous; or the `Panels` of an earlier layer, for one image.
        bias_M: float32 [M].
        activation: as in `spmm`.
        out: where to write, [M, N] or [images, M, N], or `Panels` for one image; made when None. It may not
            overlap x.

    Raises:
        FormatError: a shape, dtype, layout or overlap does not fit.
        UnknownName: no such activation.

    Example:
        >>> y = spmm_columns(weights, image.reshape(512, 14 * 14), bias, "relu")
    """
    code = activation_code(activation)
    _refuse_order(stream)
    need_bias(stream.rows, bias_M)
    if isinstance(x_KN, Panels) or isinstance(out, Panels):
        return _columns_or_panels(stream, x_KN, bias_M, code, out)
    need_floats("x", x_KN, f"[..., {stream.cols}, N]", x_KN.dim() in (2, 3) and x_KN.shape[-2] == stream.cols)
    count, images = x_KN.shape[-1], x_KN.shape[0] if x_KN.dim() == 3 else 1
    out = output(out, (*x_KN.shape[:-2], stream.rows, count), (x_KN, bias_M))
    if out.numel():
        threads = torch.get_num_threads()
        key = (COLUMN_MAJOR, images, count, code, threads)
        if (plan := known(stream, key)) is None:
            row = 4 * count
            layout = Layout(count, COLUMN_MAJOR, row, COLUMN_MAJOR, row, images, row * stream.cols, row * stream.rows)
            plan = make_plan(stream, key, layout, code, threads)
        run(plan, x_KN.data_ptr(), out.data_ptr(), bias_M)
    return out


def _columns_or_panels(
    stream: Stream, x: Tensor | Panels, bias_M: Tensor | None, code: int, out: Tensor | Panels | None
) -> Tensor | Panels:
    """One image of which x, y or both are in panels and the other in columns."""
    if isinstance(x, Panels):
        x_at, x_kind, count = _input(stream, x)
    else:
        need_floats("x", x, f"[{stream.cols}, N]", x.dim() == 2 and x.shape[0] == stream.cols)
        x_at, x_kind, count = x.data_ptr(), COLUMN_MAJOR, x.shape[1]
    if isinstance(out, Panels):
        y_at, y_kind, y_row = _panel_output(stream, out, count, x, bias_M), PANEL_MAJOR, 4 * panel_width()
    else:
        out = output(out, (stream.rows, count), (_memory(x), bias_M))
        y_at, y_kind, y_row = out.data_ptr(), COLUMN_MAJOR, 4 * count
    if count and stream.rows:
        threads = torch.get_num_threads()
        key = ("one image", x_kind, y_kind, count, code, threads)
        if (plan := known(stream, key)) is None:
            plan = make_plan(stream, key, Layout(count, x_kind, 4 * count, y_kind, y_row), code, threads)
        run(plan, x_at, y_at, bias_M)
    return out
