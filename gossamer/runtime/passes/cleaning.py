"""Passes that take out what changes nothing."""

from __future__ import annotations

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..operators import Norm, Product
from .graphs import ATEN, Constants, argument, calls, drop_unused, rows_alike, same, shape_of, skip, viewed


def no_ops(graph: fx.Graph, constants: Constants) -> int:
    """Take out what changes nothing: dropout at rest, copies, assertions on metadata, whole slices."""
    count = 0
    checks = (ATEN._assert_tensor_metadata.default, ATEN._assert_scalar.default, ATEN.sym_constrain_range.default)
    for node in calls(graph, *checks):
        if not node.users:
            graph.erase_node(node)
            count += 1
    copies = (ATEN.clone.default, ATEN.alias.default, ATEN.detach.default, ATEN.contiguous.default)
    casts = (ATEN._to_copy.default, ATEN.to.dtype, ATEN.to.device, ATEN.to.dtype_layout)
    for node in calls(graph, *copies, *casts, ATEN.dropout.default, ATEN.slice.Tensor, ATEN.expand.default):
        source = node.args[0]
        if node.target is ATEN.dropout.default and argument(node, 2, "train", True):
            continue
        if node.target is ATEN.clone.default and any(user.op == "output" for user in node.users):
            continue  # the caller gets memory of its own
        # A slice or an expansion to the same shape gives the same values.
        if same(node, source):
            skip(node, source)
            count += 1
    return count


def sunk_views(graph: fx.Graph, constants: Constants) -> int:
    """Rows flattened before a norm or a product, and given their axes back later, keep them throughout."""
    count = 0
    for node in list(graph.nodes):
        if isinstance(node.target, (Norm, Product)) and getattr(node.target, "geometry", None) is None:
            count += _sink(node)
    for node in list(graph.nodes):
        if viewed(node) and viewed(node.args[0]) and same(node, node.args[0].args[0]):
            skip(node, node.args[0].args[0])
    drop_unused(graph)
    return count


def _sink(node: fx.Node) -> bool:
    """op(view(x), view(r)) as view(op(x, r)), where the views flatten all axes but the last."""
    sources = []
    for view in node.args:
        shape = shape_of(view.args[0]) if viewed(view) else None
        if shape is None or len(shape) != 3 or len(shape_of(view) or ()) != 2:
            return False
        if not statically_known_true(shape[-1] == shape_of(view)[-1]):
            return False
        sources.append(view.args[0])
    if not all(rows_alike(sources[0], s) for s in sources):
        return False
    meta = node.meta["val"]
    with node.graph.inserting_before(node):
        new = node.graph.call_function(node.target, tuple(sources))
        flat = node.graph.call_function(ATEN.view.default, (new, [-1, meta.shape[-1]]))
    lead = sources[0].meta["val"]
    new.meta["val"] = lead.new_empty(*lead.shape[:-1], meta.shape[-1])
    flat.meta = dict(node.meta)
    node.replace_all_uses_with(flat)
    node.graph.erase_node(node)
    return True
