"""Passes on images: padding and batch norm into convolutions, pooling."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from ..operators import Geometry, GlobalPool, Pool, Product
from .graphs import (
    ATEN,
    Constants,
    alone,
    argument,
    calls,
    constant_of,
    drop_unused,
    dtype_of,
    operators,
    pair,
    shape_of,
    skip,
    swap,
)


def padded_convolutions(graph: fx.Graph, constants: Constants) -> int:
    """Zeros written around an image before a convolution are the convolution's own padding."""
    count = 0
    for node in operators(graph, Product):
        pad = node.args[0]
        if node.target.geometry is None or pad.target not in (ATEN.constant_pad_nd.default, ATEN.pad.default):
            continue
        amounts = list(pad.args[1])
        mode, value = argument(pad, 2, "mode", "constant"), argument(pad, 3, "value", None)
        if pad.target is ATEN.constant_pad_nd.default:
            mode, value = "constant", argument(pad, 2, "value", 0)
        if not all(isinstance(a, int) for a in amounts):
            continue  # padding that depends on the image's size
        if len(amounts) != 4 or mode != "constant" or value not in (0, 0.0, None) or min(amounts) < 0:
            continue
        g = node.target.geometry
        left, right, top, bottom = amounts
        around = tuple(a + b for a, b in zip(g.padding, (top, left, bottom, right)))
        swap(node, replace(node.target, geometry=replace(g, padding=around)), pad.args[0])
        count += 1
    drop_unused(graph)
    return count


def batch_norms(graph: fx.Graph, constants: Constants) -> int:
    """Batch norm at rest scales and shifts channels: fold it into the convolution before it."""
    count = 0
    norm = ATEN._native_batch_norm_legit_no_training.default
    for node in calls(graph, norm):
        before, (gamma, beta, mean, var) = node.args[0], (constant_of(a, constants) for a in node.args[1:5])
        taken = [u for u in node.users if u.args[1] == 0]
        if len(taken) != len(node.users) or not isinstance(before.target, Product) or not alone(before):
            continue
        if mean is None or var is None or before.target.activation != "none" or len(before.args) > 1:
            continue
        # A scale or shift that is computed is no constant; and channels are the last axis of rows only in two axes.
        if (gamma is None) != (node.args[1] is None) or (beta is None) != (node.args[2] is None):
            continue
        if before.target.geometry is None and len(shape_of(before) or ()) != 2:
            continue
        product = _scaled(before.target, gamma, beta, mean, var, node.args[6])
        new = swap(node, product, *before.args)
        for user in taken:
            new.meta["val"] = user.meta["val"]
            skip(user, new)
        count += 1
    drop_unused(graph)
    return count


def _scaled(product: Product, gamma, beta, mean: Tensor, var: Tensor, eps: float) -> Product:
    scale = torch.rsqrt(var.double() + eps) * (1.0 if gamma is None else gamma.double())
    shift = (0.0 if beta is None else beta.double()) - mean.double() * scale
    if product.bias is not None:
        shift = shift + product.bias.double() * scale
    weight = product.weight * scale.to(product.weight.dtype).view(-1, *[1] * (product.weight.dim() - 1))
    return replace(product, weight=weight, bias=shift.to(weight.dtype))


def pools(graph: fx.Graph, constants: Constants) -> int:
    """Largest values and means under a window."""
    count = 0
    for node in calls(graph, ATEN.max_pool2d.default, ATEN.avg_pool2d.default):
        largest = node.target is ATEN.max_pool2d.default
        kernel = pair(node.args[1])
        stride = pair(argument(node, 2, "stride", []) or kernel)
        padding = pair(argument(node, 3, "padding", 0))
        dilation = pair(argument(node, 4, "dilation", 1)) if largest else (1, 1)
        rounds_up = argument(node, 5 if largest else 4, "ceil_mode", False)
        divides = None if largest else argument(node, 6, "divisor_override", None)
        if rounds_up or divides or len(shape_of(node.args[0]) or ()) != 4 or dtype_of(node) != torch.float32:
            continue
        inside = not largest and not argument(node, 5, "count_include_pad", True)
        kind = "max" if largest else "mean_inside" if inside else "mean"
        swap(node, Pool(kind, Geometry(kernel, stride, (*padding, *padding), dilation, 1)), node.args[0])
        count += 1
    return count


def global_pools(graph: fx.Graph, constants: Constants) -> int:
    """Means over all pixels."""
    count = 0
    for node in calls(graph, ATEN.mean.dim, ATEN.adaptive_avg_pool2d.default):
        shape = shape_of(node.args[0])
        if shape is None or len(shape) != 4 or not dtype_of(node) == dtype_of(node.args[0]) == torch.float32:
            continue
        if node.target is ATEN.mean.dim:
            axes, keep = sorted(a % 4 for a in node.args[1] or ()), bool(argument(node, 2, "keepdim", False))
        else:
            axes, keep = ([2, 3], True) if list(node.args[1]) == [1, 1] else ([], False)
        if axes == [2, 3]:
            swap(node, GlobalPool(keep), node.args[0])
            count += 1
    return count
