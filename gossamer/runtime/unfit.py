"""What an exported model may do that a list of kernel calls, planned once for given sizes, cannot."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export.graph_signature import OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_WRITES = {
    OutputKind.BUFFER_MUTATION: "writes its buffer",
    OutputKind.PARAMETER_MUTATION: "writes its parameter",
    OutputKind.USER_INPUT_MUTATION: "writes its input",
}


def unfit(exported: torch.export.ExportedProgram) -> str | None:
    """Why a model cannot be planned, to follow its name; None when it can."""
    for spec in exported.graph_signature.output_specs:
        if spec.kind in _WRITES:
            return f"{_WRITES[spec.kind]} {spec.target!r} in place"
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            user = next(iter(node.users), node)
            return f"holds {user.name!r}, a choice between graphs"
        if _draws(node):
            return f"draws random numbers ({node.target})"
        if _sized_by_values(node):
            return f"makes a tensor whose size depends on values ({node.target})"
    return None


def _draws(node: fx.Node) -> bool:
    """Whether a call asks for random numbers, rather than only could."""
    target = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    arguments = target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), node.args)) | node.kwargs
    return not (given.get("train", given.get("training")) is False or given.get("dropout_p") == 0.0)


def _sized_by_values(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and bool(free_unbacked_symbols(value.shape))
