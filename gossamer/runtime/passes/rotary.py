"""The pass that finds rotary turns of heads by their positions."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..operators import Rotary
from .graphs import ATEN, Constants, calls, drop_unused, dtype_of, is_call, plain_add, rows_of, same, shape_of


def rotaries(graph: fx.Graph, constants: Constants) -> int:
    """Heads turned by their positions' angles, x cos + (-x2, x1) sin: turned as rows instead, then cut into heads."""
    count = 0
    for node in calls(graph, ATEN.add.Tensor):
        count += plain_add(node) and _rotary(node)
    drop_unused(graph)
    return count


def _rotary(node: fx.Node) -> bool:
    straight, crossed = node.args[:2]
    if not is_call(straight, ATEN.mul.Tensor) or not is_call(crossed, ATEN.mul.Tensor):
        return False
    (x, cos), (turned, sin) = straight.args, crossed.args
    rows, shape = rows_of(x) if isinstance(x, fx.Node) else None, shape_of(x)
    if rows is None or shape is None or not _half_turn(turned, x, shape[3]):
        return False
    if not isinstance(shape[1], int) or not isinstance(shape[3], int) or len(shape_of(cos) or ()) != 4:
        return False
    if not _turns_alike(shape_of(cos), shape) or not same(cos, sin) or dtype_of(node) != torch.float32:
        return False
    graph, view = node.graph, x.args[0]
    with graph.inserting_before(node):
        new = graph.call_function(Rotary(shape[1], shape[3]), (rows, cos, sin))  # type: ignore[arg-type]
        new.meta = dict(rows.meta)
        cut = graph.call_function(view.target, (new, *view.args[1:]))
        cut.meta = dict(view.meta)
        heads = graph.call_function(x.target, (cut, *x.args[1:]))
        heads.meta = dict(node.meta)
    node.replace_all_uses_with(heads)
    graph.erase_node(node)
    return True


def _turns_alike(angles: tuple, heads: tuple) -> bool:
    """Whether angles [1, 1, S, dim] turn all heads [B, heads, S, dim] of all sequences alike."""
    return all(statically_known_true(a == b) for a, b in zip(angles, (1, 1, *heads[2:])))


def _half_turn(node: object, x: fx.Node, dim: int) -> bool:
    """Whether a node is cat(-x[..., dim / 2 :], x[..., : dim / 2])."""
    if not is_call(node, ATEN.cat.default) or len(node.args[0]) != 2:
        return False
    minus, first = node.args[0]
    if not is_call(minus, ATEN.neg.default):
        return False
    second = minus.args[0]
    halves = [n.args[:4] if is_call(n, ATEN.slice.Tensor) else None for n in (first, second)]
    return halves[0] == (x, 3, 0, dim // 2) and halves[1] is not None and halves[1][:3] == (x, 3, dim // 2)
