"""Passes that find products, linear layers and convolutions, and what belongs to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels.cpu.window import same_padding
from ..operators import Combine, Geometry, Product
from .graphs import (
    ATEN,
    Constants,
    alone,
    argument,
    calls,
    constant_of,
    drop_unused,
    dtype_of,
    pair,
    plain_add,
    rows_alike,
    same,
    shape_of,
    swap,
    viewed,
)


def products(graph: fx.Graph, constants: Constants) -> int:
    """Linear layers and convolutions whose weights are constants."""
    count = 0
    for node in calls(graph, ATEN.linear.default, ATEN.conv2d.default, ATEN.conv2d.padding):
        x, weight = node.args[0], constant_of(node.args[1], constants)
        bias_node = argument(node, 2, "bias", None)
        bias = constant_of(bias_node, constants)
        if weight is None or weight.dtype != torch.float32 or weight.dim() not in (2, 4):
            continue
        if bias is None and bias_node is not None:
            continue
        name = node.args[1].name.removeprefix("p_model_").removesuffix("_weight")
        geometry = None if node.target is ATEN.linear.default else _geometry(node, weight)
        if geometry is None and node.target is not ATEN.linear.default:
            continue
        swap(node, Product(weight, bias, name, geometry=geometry), x)
        count += 1
    return count


def _geometry(node: fx.Node, weight: Tensor) -> Geometry | None:
    if len(shape_of(node.args[0]) or ()) != 4:
        return None
    stride, dilation = pair(argument(node, 3, "stride", 1)), pair(argument(node, 5, "dilation", 1))
    padding, groups = argument(node, 4, "padding", 0), argument(node, 6, "groups", 1)
    kernel = (weight.shape[2], weight.shape[3])
    if padding == "same":
        around = same_padding(kernel, (1, 1), dilation, 1, 1)
    else:
        high, wide = (0, 0) if padding == "valid" else pair(padding)
        around = (high, wide, high, wide)
    return Geometry(kernel, stride, around, dilation, groups)


def transposed_products(graph: fx.Graph, constants: Constants) -> int:
    """GPT-2's layers, x flattened times a weight stored [inputs, outputs]: products of the rows as they were."""
    count = 0
    for node in calls(graph, ATEN.addmm.default):
        bias, weight = (constant_of(node.args[i], constants) for i in (0, 2))
        flat = node.args[1]
        if bias is None or weight is None or weight.dtype != torch.float32 or bias.dim() != 1 or not alone(node):
            continue
        back, rows = next(iter(node.users)), flat.args[0] if viewed(flat) else None
        if rows is None or not viewed(back) or not rows_alike(rows, back) or node.kwargs:
            continue
        if not all(statically_known_true(shape_of(x)[-1] == k) for x, k in zip((rows, back), weight.shape)):
            continue
        name = node.args[2].name.removeprefix("p_model_").removesuffix("_weight")
        swap(back, Product(weight.t().contiguous(), bias, name), rows)
        graph.erase_node(node)
        count += 1
    drop_unused(graph)
    return count


def scaled_products(graph: fx.Graph, constants: Constants) -> int:
    """A number that multiplies all of a product belongs to its weight."""
    count = 0
    for node in calls(graph, ATEN.mul.Tensor):
        before, number = node.args[:2]
        if isinstance(number, float) and isinstance(before.target, Product) and _takes_residual(before):
            p = before.target
            bias = None if p.bias is None else p.bias * number
            swap(node, replace(p, weight=p.weight * number, bias=bias), *before.args)
            graph.erase_node(before)
            count += 1
    return count


def residuals(graph: fx.Graph, constants: Constants) -> int:
    """A sum of a product and something computed before it starts the product's own sum."""
    count, order = 0, {}
    for at, node in enumerate(graph.nodes):
        order[node] = at
    for node in calls(graph, ATEN.add.Tensor):
        a, b = node.args[:2]
        if not plain_add(node) or not same(a, b) or dtype_of(node) != torch.float32:
            continue
        able = [p for p in (a, b) if isinstance(p.target, Product) and _takes_residual(p)]
        if not able or a is b:
            swap(node, Combine("add"), a, b)
            continue
        product = max(able, key=lambda n: order.get(n, 0))
        other = b if product is a else a
        new = swap(node, product.target, *product.args, other)
        order[new] = order[node]
        graph.erase_node(product)
        count += 1
    return count


def _takes_residual(node: fx.Node) -> bool:
    return alone(node) and len(node.args) == 1 and node.target.activation == "none"
