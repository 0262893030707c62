"""How the runtime's operators run on image planes.

Lowerings as in `tokens.py`: they take a recorder, a node and its operator, and give the node's value or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ..kernels.cpu.conv import plan_conv, refuse_conv
from ..kernels.cpu.depthwise import plan_depthwise
from ..kernels.cpu.plane_ops import plan_from_planes, plan_mean, plan_pool, plan_to_planes
from ..kernels.cpu.window import Window
from .layouts import Planes
from .memory import Buffer
from .operators import Geometry, GlobalPool, Pool, Product
from .recorder import Recorder, Slot, Value
from .tokens import panel_product
from .weights import Form, Weights

if TYPE_CHECKING:
    from ..kernels.cpu.launch import Launch


def to_planes(rec: Recorder, value: Value) -> tuple[Buffer, Planes] | None:
    """The value as image planes, brought there if need be; None for what is no float32 tensor of images."""
    if isinstance(value.layout, Planes):
        return value.buffer, value.layout  # type: ignore[return-value]
    found = _images(rec, value)
    if found is None:
        return None
    slot, layout = found
    buffer = rec.buffer(layout)
    launch = plan_to_planes(layout.images, layout.features, layout.used, threads=rec.threads)
    rec.launch("images", "to planes", launch, slot, buffer)
    value.buffer, value.layout = buffer, layout
    return buffer, layout


def _images(rec: Recorder, value: Value) -> tuple[Slot, Planes] | None:
    """A tensor of torch's as contiguous images; None for what is no float32 tensor of images."""
    if value.layout is not None or value.known:
        return None
    x = rec.tensor(value)
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() != 4 or not x.numel():
        return None
    rows = rec.function("images", "contiguous", torch.Tensor.contiguous, value)
    return rows.slot, Planes(*x.shape)  # type: ignore[return-value]


def to_images(rec: Recorder, value: Value) -> Slot:
    """The value written out as an ordinary tensor [N, C, H, W]."""
    layout: Planes = value.layout  # type: ignore[assignment]
    launch = plan_from_planes(layout.images, layout.features, layout.used, threads=rec.threads)
    return rec.into_rows("images", launch, value.buffer, layout.shape)  # type: ignore[arg-type]


def product(rec: Recorder, node: fx.Node, op: Product, weights: Weights) -> Value | None:
    """act(conv(x) + b + residual)."""
    geometry: Geometry = op.geometry  # type: ignore[assignment]
    source = rec.value(node.args[0])  # type: ignore[arg-type]
    by_channel = geometry.groups == op.weight.shape[0] == op.weight.shape[1] * geometry.groups
    copied = geometry.pointwise or by_channel or isinstance(source.layout, Planes)
    # Other convolutions copy the lines they read, from images as well as from planes.
    found = to_planes(rec, source) if copied else _images(rec, source)
    if found is None:
        return None
    x, layout = found
    residual = None
    if len(node.args) > 1:
        other = to_planes(rec, rec.value(node.args[1]))  # type: ignore[arg-type]
        if other is None:
            return None
        residual = other[0]
    if geometry.pointwise:
        return panel_product(rec, op, weights, source, x, layout, residual)  # type: ignore[arg-type]
    window = Window(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
    high, wide = window.output(layout.high, layout.wide)
    out = Planes(layout.images, op.weight.shape[0], high, wide)
    if by_channel:
        return _depthwise(rec, op, window, x, layout, out, residual)
    return _convolution(rec, op, weights, window, x, layout, out, residual)


def _depthwise(
    rec: Recorder, op: Product, window: Window, x: Buffer, layout: Planes, out: Planes, residual: Buffer | None
) -> Value:
    launch = plan_depthwise(
        op.weight[:, 0], layout.images, layout.high, layout.wide, window,
        activation=op.activation, residual=residual is not None, threads=rec.threads,
    )  # fmt: skip
    y, bias = rec.buffer(out), rec.address(op.bias)
    operands = (x, y, bias) if residual is None else (x, y, bias, residual)
    rec.launch(op.name, f"depthwise {window.kernel[0]}x{window.kernel[1]}", launch, *operands)
    return Value(buffer=y, layout=out)


def _convolution(
    rec: Recorder, op: Product, weights: Weights, window: Window, x: Buffer | Slot, layout: Planes, out: Planes,
    residual: Buffer | None,
) -> Value | None:  # fmt: skip
    y, bias, groups = rec.buffer(out), rec.address(op.bias), op.geometry.groups  # type: ignore[union-attr]
    extra = () if residual is None else (residual.address,)
    x_at, stride = (x.address, layout.width) if isinstance(x, Buffer) else (rec.address_now(x), layout.used)

    def laid_out(form: Form) -> Launch:
        return plan_conv(
            form.stream, layout.images, layout.high, layout.wide, window, groups=groups,
            activation=op.activation, residual=residual is not None, threads=rec.threads, strides=(stride, out.width),
        )  # fmt: skip

    def way(form: Form) -> Callable[[], None] | None:
        if refuse_conv(form.stream, window, groups) is not None:
            return None
        launch = laid_out(form)
        return lambda: launch.run(x_at, y.address, bias, *extra)

    form = weights.fastest((layout, op.geometry, op.activation, residual is not None, rec.threads), way)
    if not isinstance(form, Form):
        return None
    rec.keep.append(form)
    operands = (x, y, bias) if residual is None else (x, y, bias, residual)
    shape = f"{window.kernel[0]}x{window.kernel[1]}"
    rec.launch(op.name, f"{shape} {form.name}, {1 - weights.density:.0%} zeros", laid_out(form), *operands)
    return Value(buffer=y, layout=out)


def pool(rec: Recorder, node: fx.Node, op: Pool) -> Value | None:
    """Largest values or means under a window."""
    value = rec.value(node.args[0])  # type: ignore[arg-type]
    if not isinstance(value.layout, Planes):
        return None
    layout, g = value.layout, op.geometry
    window = Window(g.kernel, g.stride, g.padding, g.dilation)
    out = Planes(layout.images, layout.features, *window.output(layout.high, layout.wide))
    launch = plan_pool(op.kind, layout.images, layout.features, layout.high, layout.wide, window, threads=rec.threads)
    y = rec.buffer(out)
    rec.launch(node.name, f"{op.kind} pool", launch, value.buffer, y)  # type: ignore[arg-type]
    return Value(buffer=y, layout=out)


def global_pool(rec: Recorder, node: fx.Node, op: GlobalPool) -> Value | None:
    """Means over pixels, as a new tensor of torch's: what follows is small."""
    value = rec.value(node.args[0])  # type: ignore[arg-type]
    if not isinstance(value.layout, Planes):
        return None
    n, c, high, wide = value.layout.shape
    launch = plan_mean(n, c, high * wide, threads=rec.threads)
    shape = (n, c, 1, 1) if op.keep else (n, c)
    return Value(slot=rec.into_rows(node.name, launch, value.buffer, shape))  # type: ignore[arg-type]
