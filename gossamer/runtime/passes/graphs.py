"""What passes are written with: finding nodes, asking about them, and putting operators in their place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..operators import Operator

ATEN = torch.ops.aten
Constants = dict[str, Tensor]


def calls(graph: fx.Graph, *targets: object) -> Iterator[fx.Node]:
    """Calls of these functions, in order; nodes may be taken out meanwhile."""
    wanted = set(targets)
    return (n for n in list(graph.nodes) if n.op == "call_function" and n.target in wanted)


def operators(graph: fx.Graph, kind: type[Operator]) -> Iterator[fx.Node]:
    """Calls of our own operators of a kind, in order."""
    return (n for n in list(graph.nodes) if isinstance(n.target, kind))


def swap(node: fx.Node, operator: Operator, *inputs: fx.Node) -> fx.Node:
    """Put an operator where a node stands."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(operator, inputs)  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def skip(node: fx.Node, source: fx.Node) -> None:
    """Take a node out; its users read its source."""
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def drop_unused(graph: fx.Graph) -> None:
    """At rest nothing here has effects: dropout inside attention is off, random numbers are not drawn."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def shape_of(node: object) -> tuple | None:
    """Of the tensor that a node holds, with symbols for open sizes; None where it holds none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def dtype_of(node: object) -> torch.dtype | None:
    """Of the tensor that a node holds; None where it holds none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def same(a: object, b: object) -> bool:
    """Whether two nodes hold tensors of one shape and dtype, whatever the open sizes are."""
    sa, sb = shape_of(a), shape_of(b)
    if sa is None or sb is None or len(sa) != len(sb) or dtype_of(a) != dtype_of(b):
        return False
    return all(statically_known_true(x == y) for x, y in zip(sa, sb))


def constant_of(node: object, constants: Constants) -> Tensor | None:
    """The weight or buffer that a placeholder stands for."""
    return constants.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None


def alone(node: fx.Node) -> bool:
    """Whether one other node reads it."""
    return len(node.users) == 1


def argument(node: fx.Node, at: int, name: str, default: object) -> object:
    """An argument of a call, given by position, by name, or not at all."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def is_call(node: object, target: object) -> bool:
    """Whether a node calls this function."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def plain_add(node: object) -> bool:
    """Whether a node adds two things as they are: torch's sum can multiply the second by a number, `alpha`."""
    return is_call(node, ATEN.add.Tensor) and node.kwargs.get("alpha", 1) == 1  # type: ignore[union-attr]


def viewed(node: object) -> bool:
    """Whether a node only gives its source other axes."""
    return any(is_call(node, t) for t in (ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default))


def rows_alike(a: object, b: object) -> bool:
    """Whether two nodes agree in all axes but the last."""
    sa, sb = shape_of(a), shape_of(b)
    if sa is None or sb is None or len(sa) != len(sb):
        return False
    return all(statically_known_true(x == y) for x, y in zip(sa[:-1], sb[:-1]))


def pair(value: object) -> tuple[int, int]:
    """High and wide, given as one number, or as a list of one or two."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def rows_of(node: fx.Node) -> fx.Node | None:
    """x, where a node is x.view(B, S, heads, dim).transpose(1, 2)."""
    if not is_call(node, ATEN.transpose.int) or sorted(node.args[1:]) != [1, 2]:
        return None
    view = node.args[0]
    if not viewed(view):
        return None
    rows, (x, cut) = view.args[0], (shape_of(view.args[0]), shape_of(view))
    if x is None or cut is None or len(x) != 3 or len(cut) != 4:
        return None
    return rows if all(statically_known_true(a == b) for a, b in zip(x[:2], cut[:2])) else None
