"""How the runtime's operators run on token panels.

A lowering takes a recorder, a node and its operator, adds launches, and gives the node's value; None leaves the node
to torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ..kernels.cpu.attention import plan_attention
from ..kernels.cpu.elementwise import plan_elementwise, plan_rotary, rotary_table
from ..kernels.cpu.norm import plan_layer_norm, plan_rms_norm
from ..kernels.cpu.spmm_panels import plan_panels
from ..kernels.cpu.tokens import plan_panels_to_rows, plan_rows_to_panels
from . import dense
from .layouts import Layout, Tokens
from .operators import Attention, Combine, Norm, Product, Rotary
from .recorder import Recorder, Slot, Value
from .weights import Form, Weights

if TYPE_CHECKING:
    from .memory import Buffer


def to_panels(rec: Recorder, value: Value) -> tuple[Buffer, Tokens] | None:
    """The value as token panels, brought there if need be; None for what is no float32 tensor of rows."""
    if isinstance(value.layout, Tokens):
        return value.buffer, value.layout  # type: ignore[return-value]
    if value.layout is not None:
        return None
    x = rec.tensor(value)
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() < 2 or not x.numel():
        return None
    layout = Tokens(tuple(x.shape[:-1]), x.shape[-1])
    source: Slot | int
    if value.known:
        source = rec.address(x.contiguous())
    else:
        rows = rec.function("rows", "contiguous", torch.Tensor.contiguous, value)
        source = rows.slot  # type: ignore[assignment]
    buffer = rec.buffer(layout)
    launch = plan_rows_to_panels(layout.sequences, layout.positions, layout.features, threads=rec.threads)
    rec.launch("rows", "to panels", launch, source, buffer)
    if not value.known:
        value.buffer, value.layout = buffer, layout
    return buffer, layout


def to_rows(rec: Recorder, value: Value) -> Slot:
    """The value written out as an ordinary tensor."""
    layout: Tokens = value.layout  # type: ignore[assignment]
    launch = plan_panels_to_rows(layout.sequences, layout.positions, layout.features, threads=rec.threads)
    return rec.into_rows("rows", launch, value.buffer, layout.shape)  # type: ignore[arg-type]


def product(rec: Recorder, node: fx.Node, op: Product, weights: Weights) -> Value | None:
    """act(W x + b + residual)."""
    source = rec.value(node.args[0])  # type: ignore[arg-type]
    found = to_panels(rec, source)
    if found is None:
        return None
    x, layout = found
    residual = None
    if len(node.args) > 1:
        other = to_panels(rec, rec.value(node.args[1]))  # type: ignore[arg-type]
        if other is None or other[1].lead != layout.lead:
            return None
        residual = other[0]
    return panel_product(rec, op, weights, source, x, layout, residual)


def panel_product(
    rec: Recorder, op: Product, weights: Weights, source: Value, x: Buffer, layout: Layout, residual: Buffer | None
) -> Value:
    """The product of any panels, tokens or planes, in the way that is fastest on them."""
    out = layout.with_features(weights.w_MK.shape[0])
    y, bias = rec.buffer(out), rec.address(op.bias)
    extra = () if residual is None else (residual.address,)

    def laid_out(form: Form):
        return plan_panels(
            form.stream,
            panels=layout.panels,
            width=layout.width,
            used=layout.used,
            used_last=layout.used_last,
            activation=op.activation,
            residual=residual is not None,
            threads=rec.threads,
        )

    def way(form: Form):
        launch = laid_out(form)
        return lambda: launch.run(x.address, y.address, bias, *extra)

    others = {}
    if dense.worth_trying(op, weights, layout):
        others = {dense.NAME: partial(dense.way, op, weights, layout, x, y, rec.threads)}  # type: ignore[arg-type]
    size = (layout.panels, layout.width, layout.used, layout.used_last)
    if others:  # dense products take the positions that are there, without those that fill up vectors
        size += (layout.sequences, layout.positions)  # type: ignore[union-attr]
    form = weights.fastest((*size, op.activation, residual is not None, rec.threads), way, others)
    if not isinstance(form, Form):
        dense.record(rec, op, weights, source, layout, y, residual)  # type: ignore[arg-type]
        return Value(buffer=y, layout=out)
    rec.keep.append(form)
    operands = (x, y, bias) if residual is None else (x, y, bias, residual)
    rec.launch(op.name, f"{form.name}, {1 - weights.density:.0%} zeros", laid_out(form), *operands)
    return Value(buffer=y, layout=out)


def norm(rec: Recorder, node: fx.Node, op: Norm) -> Value | None:
    """Layer norm or RMS norm of panels; rows that come from torch stay there."""
    source = rec.value(node.args[0])  # type: ignore[arg-type]
    if not isinstance(source.layout, Tokens) or source.layout.features != op.gamma.numel():
        return None
    y, make = rec.buffer(source.layout), plan_layer_norm if op.centred else plan_rms_norm
    launch = make(source.layout.panels, source.layout.features, op.eps, threads=rec.threads)
    gamma, beta = rec.address(op.gamma), rec.address(op.beta)
    rec.launch(node.name, "layer norm" if op.centred else "RMS norm", launch, source.buffer, 0, gamma, beta, y)  # type: ignore[arg-type]
    return Value(buffer=y, layout=source.layout)


def attention(rec: Recorder, node: fx.Node, op: Attention) -> Value | None:
    """Attention of panels whose mask, if there is one, is the same for all queries and heads."""
    parts = [rec.value(a) for a in node.args[:3]]  # type: ignore[arg-type]
    if not any(isinstance(p.layout, Tokens) for p in parts):
        return None
    found = [to_panels(rec, p) for p in parts]
    layouts = [f[1] for f in found if f is not None]
    if len(layouts) != 3 or len({layout.lead for layout in layouts}) != 1 or len(layouts[0].lead) != 2:
        return None
    batch, seq = layouts[0].lead
    mask, row, causal = 0, None, op.causal
    if len(node.args) > 3:
        seen = seen_by(rec, rec.value(node.args[3]), batch, seq)  # type: ignore[arg-type]
        if seen is None:
            return None
        causal = causal or seen.causal
        if seen.keys is not None:
            mask, row = seen.keys.slot or rec.address(seen.keys.constant), seq  # type: ignore[arg-type]
    out = layouts[0].with_features(op.heads * op.dim)
    y = rec.buffer(out)
    launch = plan_attention(
        batch, seq, op.heads, op.dim,
        kv_heads=op.kv_heads, causal=causal, scale=op.scale,
        features=(*(layout.features for layout in layouts), out.features), offsets=(*op.offsets, 0),
        mask_row=row, threads=rec.threads,
    )  # fmt: skip
    q, k, v = (f[0] for f in found)  # type: ignore[index]
    rec.launch(node.name, f"attention, {op.heads} heads", launch, q, k, v, y, mask)  # type: ignore[arg-type]
    return Value(buffer=y, layout=out)


@dataclass(frozen=True)
class Seen:
    """What queries see.

    Args:
        keys: a float to add per key, [B, S], where some are hidden from all queries alike.
        causal: each position sees itself and those before only.
    """

    keys: Value | None
    causal: bool = False


def seen_by(rec: Recorder, mask: Value, batch: int, seq: int) -> Seen | None:
    """A mask in the terms of the kernel, worked out once; None when it says more."""
    if mask not in rec.seen:
        rec.seen[mask] = _seen(rec, mask, batch, seq)
    return rec.seen[mask]  # type: ignore[return-value]


def _seen(rec: Recorder, mask: Value, batch: int, seq: int) -> Seen | None:
    if mask.both is not None:
        parts = [p for p in (seen_by(rec, part, batch, seq) for part in mask.both) if p is not None]
        keys = [p.keys for p in parts if p.keys is not None]
        if len(parts) == 2 and len(keys) < 2:
            return Seen(keys[0] if keys else None, any(p.causal for p in parts))
    m = rec.tensor(mask)
    if not isinstance(m, Tensor) or m.dim() != 4 or m.shape[-1] != seq or m.shape[0] not in (1, batch):
        return None
    if mask.known and (plain := _without_keys(m, seq)) is not None:
        return plain
    if any(m.shape[axis] != 1 and m.stride(axis) != 0 for axis in (1, 2)):
        return None
    if mask.known:
        return Seen(Value(constant=additive_keys(m, batch)))
    return Seen(rec.function("mask", "per key", additive_keys, mask, batch))


def _without_keys(mask: Tensor, seq: int) -> Seen | None:
    """A mask that hides nothing, or only what comes later."""
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if bool(allowed.all()):
        return Seen(None)
    hidden = True if mask.dtype == torch.bool else bool((mask[~allowed] <= torch.finfo(mask.dtype).min).all())
    triangle = torch.ones(seq, seq, dtype=torch.bool).tril()
    if hidden and mask.shape[2] == seq and bool((allowed == triangle).all()):
        return Seen(None, causal=True)
    return None


def additive_keys(mask: Tensor, batch: int) -> Tensor:
    """A mask [B or 1, h, q, S] that is the same for all h and q, as floats to add, [B, S]."""
    keys = mask[:, 0, 0]
    if keys.dtype == torch.bool:
        keys = torch.where(keys, 0.0, -torch.inf)
    return keys.to(torch.float32).expand(batch, -1).contiguous()


def combine(rec: Recorder, node: fx.Node, op: Combine) -> Value | None:
    """act(x), act(x + other) or act(x) * other of panels, tokens or planes."""
    values = [rec.value(a) for a in node.args]  # type: ignore[arg-type]
    layout = values[0].layout
    if layout is None or any(v.layout != layout for v in values):
        return None
    y = rec.buffer(layout)
    launch = plan_elementwise(
        layout.panels, layout.features, width=layout.width, form=op.form, activation=op.activation, threads=rec.threads
    )
    other = values[1].buffer if len(values) == 2 else 0
    rec.launch(node.name, f"{op.form}, {op.activation}", launch, values[0].buffer, other, y)  # type: ignore[arg-type]
    return Value(buffer=y, layout=layout)


def rotary(rec: Recorder, node: fx.Node, op: Rotary) -> Value | None:
    """Positions turned by angles that are the same at every call with these shapes."""
    x, cos, sin = (rec.value(a) for a in node.args)  # type: ignore[arg-type]
    if not isinstance(x.layout, Tokens) or len(x.layout.lead) != 2 or not (cos.known and sin.known):
        return None
    batch, seq = x.layout.lead
    halves = [t.constant.reshape(-1, op.dim)[:seq].chunk(2, dim=-1) for t in (cos, sin)]  # type: ignore[union-attr]
    if not all(torch.equal(*pair) for pair in halves):
        return None
    tables = [rotary_table(first) for first, _ in halves]
    y = rec.buffer(x.layout)
    launch = plan_rotary(batch, seq, op.heads, op.dim, threads=rec.threads)
    rec.launch(node.name, "rotary", launch, x.buffer, *map(rec.address, tables), y)  # type: ignore[arg-type]
    return Value(buffer=y, layout=x.layout)
