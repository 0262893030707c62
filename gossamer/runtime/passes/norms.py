"""The pass that finds layer norm and RMS norm."""

from __future__ import annotations

import torch
from torch import fx

from ..operators import Norm
from .graphs import ATEN, Constants, argument, calls, constant_of, drop_unused, is_call, swap


def norms(graph: fx.Graph, constants: Constants) -> int:
    """Layer norm and RMS norm over the last axis."""
    count = 0
    for node in calls(graph, ATEN.layer_norm.default):
        x, shape = node.args[:2]
        gamma, beta = (constant_of(argument(node, i, n, None), constants) for i, n in ((2, "weight"), (3, "bias")))
        if gamma is not None and len(shape) == 1 and gamma.dtype == torch.float32:
            swap(node, Norm(gamma, beta, argument(node, 4, "eps", 1e-5)), x)
            count += 1
    for node in calls(graph, ATEN.mul.Tensor):
        count += _rms(node, constants)
    drop_unused(graph)
    return count


def _rms(node: fx.Node, constants: Constants) -> bool:
    """gamma * (x * rsqrt(mean(x ** 2) + eps)), as transformers writes it."""
    for gamma_node, inner in (node.args[:2], node.args[1::-1]):
        gamma = constant_of(gamma_node, constants)
        if gamma is None or gamma.dim() != 1 or not is_call(inner, ATEN.mul.Tensor):
            continue
        x, root = inner.args
        if not is_call(root, ATEN.rsqrt.default) or not is_call(root.args[0], ATEN.add.Tensor):
            continue
        mean, eps = root.args[0].args
        if not is_call(mean, ATEN.mean.dim) or list(mean.args[1]) != [-1] or not isinstance(eps, float):
            continue
        square = mean.args[0]
        if is_call(square, ATEN.pow.Tensor_Scalar) and square.args == (x, 2):
            swap(node, Norm(gamma, None, eps, centred=False), x)
            return True
    return False
