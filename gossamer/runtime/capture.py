"""Capture: a model as a graph of ATen operators, with its batch and length left open.

`torch.export` follows one call of the model. What comes back holds the operators in order, the weights as constants,
and how inputs and outputs nest.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ..core.errors import GossamerError
from ..deploy.examples import Example
from .unfit import unfit

# A size is a number, or a symbol that stands for the same open size wherever it appears.
Shape = tuple[int | str, ...]
_TENSOR = object()


class CaptureError(GossamerError):
    """The model cannot be followed as one graph; run it layer by layer, as `pack` leaves it."""


@dataclass(frozen=True)
class Call:
    """One call of a model, flattened.

    Args:
        tensors: its tensors, in order.
        spec: how the arguments nest.
        leaves: every value in order, a mark where a tensor stood; these must be the same at every call.
    """

    tensors: list[Tensor]
    spec: pytree.TreeSpec
    leaves: tuple[object, ...]

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, object]) -> Call:
        leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return cls(tensors, spec, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    @classmethod
    def of_example(cls, example: Example) -> Call:
        if isinstance(example, Mapping):
            return cls.of((), example)
        return cls.of(example if isinstance(example, tuple) else (example,), {})

    def arguments(self, tensors: list[Tensor] | None = None) -> tuple[tuple, dict[str, object]]:
        """Positional and keyword arguments, with these tensors in place of the call's own."""
        left = iter(self.tensors if tensors is None else tensors)
        leaves = [next(left) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class Captured:
    """A model followed through one call.

    Args:
        graph: operators on placeholders; each placeholder is an input or a constant.
        constants: weights and buffers, by placeholder.
        inputs: placeholders of the call's tensors, in order.
        shapes: of each input.
        ranges: least and greatest value of each open size.
        call: the call that was followed.
        out_spec: how the outputs nest.
        guards: called with the inputs, raises where the model took another way for sizes like these.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    ranges: dict[str, tuple[int, int]]
    call: Call
    out_spec: pytree.TreeSpec
    guards: Callable[..., object] | None = None

    def refuse(self, call: Call) -> str | None:
        """Why this graph does not compute a call; None when it does."""
        if call.spec != self.call.spec or call.leaves != self.call.leaves:
            return "its arguments nest in another way, or a value that is no tensor has changed"
        sizes: dict[str, int] = {}
        for name, tensor, shape, was in zip(self.inputs, call.tensors, self.shapes, self.call.tensors):
            if tensor.dtype != was.dtype or tensor.device != was.device:
                return f"{name} is {tensor.dtype} on {tensor.device}, captured was {was.dtype} on {was.device}"
            if len(tensor.shape) != len(shape) or not all(map(self._fits(sizes), tensor.shape, shape)):
                return f"{name} has shape {list(tensor.shape)}, captured was {list(shape)}"
        return None

    def decides(self, call: Call) -> str | None:
        """What about the sizes of a call may make the model take another way; None when nothing does."""
        return _broken(self.guards, call)

    def _fits(self, sizes: dict[str, int]):
        def fits(got: int, want: int | str) -> bool:
            if not isinstance(want, str):
                return got == want
            low, high = self.ranges.get(want, (0, 1 << 62))
            # The exporter starts open sizes at two; any other least size is the model's own.
            low = 1 if low == 2 else low
            return low <= got <= high and got == sizes.setdefault(want, got)

        return fits


def capture(model: nn.Module, call: Call) -> Captured:
    """Follow one call of the model. Sizes that the model does not fix stay open.

    Raises:
        CaptureError: the model cannot be exported, or does what a list of kernel calls cannot; the reason is given.
    """
    if not call.tensors:
        raise CaptureError(f"the example of {type(model).__name__} holds no tensor; compile with the tensors it takes")
    exported, followed, guards = _export(model, call)
    if (reason := unfit(exported)) is not None:
        raise CaptureError(f"{type(model).__name__} {reason}; run it layer by layer, as `pack` leaves it")
    inputs, constants = [], {}
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is not InputKind.USER_INPUT:
            constants[name] = _constant(exported, spec.target)
        elif not hasattr(spec.arg, "value"):
            inputs.append(name)
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    shapes = tuple(tuple(_size(size) for size in nodes[name].meta["val"].shape) for name in inputs)
    return Captured(
        graph=exported.graph,
        constants=constants,
        inputs=tuple(inputs),
        shapes=shapes,
        ranges=_ranges(exported),
        call=followed,
        out_spec=exported.call_spec.out_spec,
        guards=guards,
    )


class _Whole(nn.Module):
    """The model called with its arguments as one tree, so that open sizes can be named in the same tree."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args, kwargs):
        return self.model(*args, **kwargs)


def _export(model: nn.Module, call: Call):
    """The exported program, the call that was followed, with open sizes where the model leaves any, and the guards."""
    reason = ""
    for followed, opened in ((_stretched(call), True), (call, True), (call, False)):
        args, kwargs = followed.arguments()
        sizes = pytree.tree_map(lambda leaf: _sizes(leaf, opened=opened), (args, kwargs))  # noqa: B023
        try:
            with _quiet(), torch.no_grad():
                exported = torch.export.export(_Whole(model).eval(), (args, kwargs), dynamic_shapes=sizes)
                # Without any decomposition asked for, this only takes operators that write in place out.
                exported = exported.run_decompositions({})
                guards = getattr(exported.module(), "_guards_fn", None)
        except Exception as error:  # a tracer over foreign code may fail in any way
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        if _serves(exported, call) and _broken(guards, call) is None:
            return exported, call, guards
        reason = "a size that it fixes was stretched"
    raise CaptureError(f"{type(model).__name__} cannot be followed as one graph: {reason}")


def _sizes(leaf: object, *, opened: bool):
    if not isinstance(leaf, Tensor) or not opened:
        return None
    # A size of one is always fixed by the exporter, so opening it would be refused.
    return {axis: torch.export.Dim.AUTO for axis, size in enumerate(leaf.shape) if size > 1}


def _stretched(call: Call) -> Call:
    """The call with a batch of one doubled, because a size of one would be fixed."""
    if not call.tensors or any(t.dim() == 0 or t.shape[0] != 1 for t in call.tensors):
        return call
    return Call([torch.cat([t, t]) for t in call.tensors], call.spec, call.leaves)


def _serves(exported, call: Call) -> bool:
    """Whether every fixed size is the call's own."""
    nodes = [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"]
    shapes = [v.shape for v in nodes[len(nodes) - len(call.leaves) :] if isinstance(v, Tensor)]
    return all(
        isinstance(_size(size), str) or _size(size) == got
        for shape, tensor in zip(shapes, call.tensors)
        for size, got in zip(shape, tensor.shape)
    )


def _size(size: object) -> int | str:
    # A symbol that the model fixed to a number prints as that number.
    return int(str(size)) if str(size).isdigit() else str(size)


def _ranges(exported) -> dict[str, tuple[int, int]]:
    unlimited = 1 << 62
    found = {}
    for symbol, limits in exported.range_constraints.items():
        # Infinity compares but does not convert; numbers read from tensors have it below, too.
        low, high = (int(x) if -unlimited < x < unlimited else None for x in (limits.lower, limits.upper))
        found[str(symbol)] = (low or 0, unlimited if high is None else high)
    return found


def _broken(guards: Callable[..., object] | None, call: Call) -> str | None:
    """The guard that a call breaks, in words; None when it keeps all."""
    try:
        if guards is not None:
            guards(*pytree.tree_leaves(call.arguments()))
    except AssertionError as error:
        return f"the model takes another way for these sizes ({error})"
    return None


def _constant(exported, target: str) -> Tensor:
    """A weight, buffer or constant tensor, without its history."""
    found = exported.state_dict.get(target)
    return (exported.constants[target] if found is None else found).detach()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs its own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
