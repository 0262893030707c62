"""The pass that finds layer norm and RMS norm."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..operators import Norm
from .graphs import (
    ATEN,
    Constants,
    argument,
    calls,
    constant_of,
    drop_unused,
    dtype_of,
    is_call,
    plain_add,
    same,
    shape_of,
    swap,
)


def norms(graph: fx.Graph, constants: Constants) -> int:
    """Layer norm and RMS norm over the last axis."""
    count = 0
    for node in calls(graph, ATEN.layer_norm.default):
        gamma, beta = (constant_of(argument(node, i, n, None), constants) for i, n in ((2, "weight"), (3, "bias")))
        shift_is_computed = beta is None and argument(node, 3, "bias", None) is not None
        if _scales(gamma, node) and not shift_is_computed:
            swap(node, Norm(gamma, beta, argument(node, 4, "eps", 1e-5)), node.args[0])
            count += 1
    for node in calls(graph, ATEN.rms_norm.default):
        gamma, eps = constant_of(argument(node, 2, "weight", None), constants), argument(node, 3, "eps", None)
        if _scales(gamma, node):
            eps = torch.finfo(torch.float32).eps if eps is None else eps
            swap(node, Norm(gamma, None, eps, centred=False), node.args[0])
            count += 1
    for node in calls(graph, ATEN.mul.Tensor):
        count += _rms(node, constants)
    drop_unused(graph)
    return count


def _scales(gamma: Tensor | None, node: fx.Node) -> bool:
    """Whether a constant holds one float32 factor per feature of a float32 tensor of rows."""
    shape = shape_of(node)
    if gamma is None or shape is None or gamma.dtype != torch.float32 or dtype_of(node) != torch.float32:
        return False
    return gamma.dim() == 1 and statically_known_true(shape[-1] == gamma.numel())


def _rms(node: fx.Node, constants: Constants) -> bool:
    """gamma * (x * rsqrt(mean(x ** 2) + eps)), as transformers writes it."""
    for gamma_node, inner in (node.args[:2], node.args[1::-1]):
        gamma = constant_of(gamma_node, constants)
        if gamma is None or not _scales(gamma, node) or not is_call(inner, ATEN.mul.Tensor):
            continue
        x, eps = inner.args[0], _root_mean_square(*inner.args[:2])
        if eps is not None and same(x, node):
            swap(node, Norm(gamma, None, eps, centred=False), x)
            return True
    return False


def _root_mean_square(x: object, root: object) -> float | None:
    """eps, where a node is 1 / sqrt(mean(x ** 2) + eps) over the last axis, which is kept."""
    if not is_call(root, ATEN.rsqrt.default) or not plain_add(root.args[0]):
        return None
    mean, eps = root.args[0].args[:2]
    if not is_call(mean, ATEN.mean.dim) or list(mean.args[1] or ()) != [-1] or not isinstance(eps, float):
        return None
    square = mean.args[0]
    squared = is_call(square, ATEN.pow.Tensor_Scalar) and square.args == (x, 2)
    return eps if squared and argument(mean, 2, "keepdim", False) else None
