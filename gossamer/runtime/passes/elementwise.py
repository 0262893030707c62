"""Passes on elementwise operators: activations, and products of two tensors."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from ..operators import Combine, Product
from .graphs import ATEN, Constants, alone, argument, calls, drop_unused, dtype_of, is_call, plain_add, same, swap


def tanh_gelus(graph: fx.Graph, constants: Constants) -> int:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written out as transformers does."""
    count = 0
    for node in calls(graph, ATEN.tanh.default):
        x = _tanh_argument(node.args[0])
        plus = next(iter(node.users)) if alone(node) else None
        if x is None or not plain_add(plus) or plus.args[1] != 1.0 or not alone(plus):
            continue
        last = next(iter(plus.users))
        halves = [a for a in last.args if is_call(a, ATEN.mul.Tensor) and a.args == (x, 0.5)]
        if is_call(last, ATEN.mul.Tensor) and len(halves) == 1:
            with graph.inserting_before(last):
                new = graph.call_function(ATEN.gelu.default, (x,), {"approximate": "tanh"})
            new.meta = dict(last.meta)
            last.replace_all_uses_with(new)
            graph.erase_node(last)
            count += 1
    drop_unused(graph)
    return count


def _tanh_argument(node: object) -> fx.Node | None:
    """x, where a node is sqrt(2/pi) (x + 0.044715 x^3)."""
    if not is_call(node, ATEN.mul.Tensor) or abs(_number(node.args[1]) - 0.7978845608) > 1e-6:
        return None
    total = node.args[0]
    if not plain_add(total) or not is_call(total.args[1], ATEN.mul.Tensor):
        return None
    x, cube = total.args[0], total.args[1].args[0]
    right = is_call(cube, ATEN.pow.Tensor_Scalar) and cube.args == (x, 3.0) and total.args[1].args[1] == 0.044715
    return x if right else None


def _number(x: object) -> float:
    return float(x) if isinstance(x, (int, float)) else float("inf")


def activations(graph: fx.Graph, constants: Constants) -> int:
    """An activation that is the only user of a product belongs to it."""
    count = 0
    for node in list(graph.nodes):
        name = _activation_of(node)
        if name is None or not dtype_of(node) == dtype_of(node.args[0]) == torch.float32:
            continue
        before = node.args[0]
        if _takes_activation(before):
            swap(node, replace(before.target, activation=name), *before.args)
            graph.erase_node(before)
            count += 1
        else:
            swap(node, Combine("alone", name), before)
    return count


def _activation_of(node: fx.Node) -> str | None:
    """The activation that a node computes of its first argument."""
    if node.op != "call_function":
        return None
    if node.target is ATEN.hardtanh.default:
        limits = (argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0))
        return "relu6" if limits == (0.0, 6.0) else None
    if node.target is ATEN.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(argument(node, 1, "approximate", "none"))
    if node.target is ATEN.clamp.default:
        limits = (argument(node, 1, "min", None), argument(node, 2, "max", None))
        return {(0, 6): "relu6", (0, None): "relu"}.get(limits)
    names = {"relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hard_swish"}
    return names.get(getattr(node.target, "__name__", "").split(".")[0])


def _takes_activation(node: fx.Node) -> bool:
    sums = isinstance(node.target, Product) or (isinstance(node.target, Combine) and node.target.form == "add")
    return sums and node.target.activation == "none" and alone(node)


def gates(graph: fx.Graph, constants: Constants) -> int:
    """The product of two tensors of one shape; an activation that only the product reads belongs to it."""
    count = 0
    for node in calls(graph, ATEN.mul.Tensor):
        a, b = node.args[:2]
        if not same(a, b) or dtype_of(node) != torch.float32 or a is b:
            continue
        for x, other in ((a, b), (b, a)):
            if isinstance(x.target, Combine) and x.target.form == "alone" and alone(x):
                swap(node, Combine("multiply", x.target.activation), x.args[0], other)
                graph.erase_node(x)
                break
        else:
            swap(node, Combine("multiply"), a, b)
        count += 1
    return count
