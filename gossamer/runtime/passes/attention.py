"""Passes that find attention between heads cut from rows, and the products that it reads."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..operators import Attention, Product
from .graphs import (
    ATEN,
    Constants,
    alone,
    argument,
    calls,
    drop_unused,
    dtype_of,
    is_call,
    operators,
    rows_of,
    same,
    shape_of,
    swap,
    viewed,
)


def attentions(graph: fx.Graph, constants: Constants) -> int:
    """Scaled dot products between heads that were cut from rows and are put back into rows."""
    count = 0
    for node in calls(graph, ATEN.scaled_dot_product_attention.default):
        count += _attention(node)
    drop_unused(graph)
    return count


def _attention(node: fx.Node) -> bool:
    q, k, v = node.args[:3]
    mask = argument(node, 3, "attn_mask", None)
    if argument(node, 4, "dropout_p", 0.0) != 0.0 or dtype_of(node) != torch.float32:
        return False
    k, v = _unrepeated(k), _unrepeated(v)
    rows = [rows_of(x) for x in (q, k, v)]
    out = _back_to_rows(node)
    if None in rows or out is None:
        return False
    heads, dim = q.meta["val"].shape[1], q.meta["val"].shape[3]
    kv_heads = k.meta["val"].shape[1]
    if not (isinstance(heads, int) and isinstance(dim, int) and isinstance(kv_heads, int) and same(k, v)):
        return False
    scale = argument(node, 6, "scale", None)
    scale = dim**-0.5 if scale is None else scale
    causal = bool(argument(node, 5, "is_causal", False))
    inputs = [*rows, mask] if mask is not None else rows
    swap(out, Attention(heads, kv_heads, dim, scale, causal), *inputs)
    return True


def _unrepeated(node: fx.Node) -> fx.Node:
    """k or v before each of its heads was repeated for several heads of q."""
    expanded = node.args[0] if viewed(node) else None
    if not is_call(expanded, ATEN.expand.default) or not is_call(expanded.args[0], ATEN.unsqueeze.default):
        return node
    source, axis = expanded.args[0].args
    before, after = shape_of(source), shape_of(node)
    if axis != 2 or before is None or after is None or len(before) != 4 or len(after) != 4:
        return node
    return source if all(statically_known_true(before[i] == after[i]) for i in (0, 2, 3)) else node


def _back_to_rows(node: fx.Node) -> fx.Node | None:
    """The node that holds y as rows [B, S, heads * dim], where nothing else uses y."""
    at, turned = node, False
    for _ in range(4):
        if not alone(at):
            return None
        at = next(iter(at.users))
        if not turned and is_call(at, ATEN.transpose.int) and sorted(at.args[1:]) == [1, 2]:
            turned = True
        elif not (viewed(at) or is_call(at, ATEN.clone.default)):
            return None
        shape = shape_of(at)
        if turned and shape is not None and len(shape) == 3:
            batch, heads, length, dim = shape_of(node)
            wanted = (batch, length, heads * dim)
            return at if all(statically_known_true(a == b) for a, b in zip(shape, wanted)) else None
        if not turned and not same(at, node):
            return None
    return None


def merged_projections(graph: fx.Graph, constants: Constants) -> int:
    """Query, key and value products of one input become one product, of which attention takes its parts."""
    count = 0
    for node in operators(graph, Attention):
        q, k, v = node.args[:3]
        parts = (q, k, v)
        if len(set(parts)) != 3 or not all(isinstance(p.target, Product) and alone(p) for p in parts):
            continue
        if any(
            len(p.args) > 1 or p.args != q.args or p.target.activation != "none" or p.target.geometry for p in parts
        ):
            continue
        if len({p.target.bias is None for p in parts}) != 1:
            continue
        merged = _merged([p.target for p in parts])
        first = min(parts, key=list(graph.nodes).index)
        with graph.inserting_before(first):
            product = graph.call_function(merged, q.args)  # type: ignore[arg-type]
        sizes = [p.target.weight.shape[0] for p in parts]
        operator = replace(node.target, offsets=(0, sizes[0], sizes[0] + sizes[1]))
        swap(node, operator, product, product, product, *node.args[3:])
        for part in parts:
            graph.erase_node(part)
        count += 1
    return count


def _merged(parts: list[Product]) -> Product:
    bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
    stem = parts[0].name.rsplit("_", 1)[0]
    return Product(torch.cat([p.weight for p in parts]), bias, f"{stem}_(qkv)")


def split_projections(graph: fx.Graph, constants: Constants) -> int:
    """Queries, keys and values that were split from one product are read where they lie."""
    count = 0
    for node in operators(graph, Attention):
        parts = node.args[:3]
        if any(node.target.offsets) or not all(p.target is operator.getitem for p in parts):
            continue
        split = parts[0].args[0]
        sizes = split.args[1] if is_call(split, ATEN.split.Tensor) else None
        axis = argument(split, 2, "dim", 0)
        if any(p.args[0] is not split for p in parts) or not isinstance(sizes, int) or axis not in (-1, 2):
            continue
        source, offsets = split.args[0], tuple(p.args[1] * sizes for p in parts)
        swap(node, replace(node.target, offsets=offsets), source, source, source, *node.args[3:])
        count += 1
    drop_unused(graph)
    return count
