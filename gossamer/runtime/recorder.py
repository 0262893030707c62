"""Recorder: runs a graph node by node on a real call, and notes what there is to repeat.

Whatever does not depend on the inputs is computed while recording and kept; operators with kernels of ours become
launches on panels; all others are called as torch has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..kernels.cpu.launch import Launch
from ..kernels.cpu.memory import floats
from .layouts import Layout
from .memory import ALIGN, Buffer
from .operators import Operator

ATEN = torch.ops.aten
_UNKNOWN = object()


@dataclass(frozen=True)
class Slot:
    """A place for a tensor of torch's that is new in every run."""

    index: int


@dataclass(eq=False)
class Value:
    """What a node gives: a constant, a tensor in a slot, or panels; the latter two may stand side by side.

    `both` holds the two masks of which a mask is the conjunction; such parts are `pinned`, kept while recording.
    """

    constant: object = _UNKNOWN
    slot: Slot | None = None
    buffer: Buffer | None = None
    layout: Layout | None = None
    both: tuple[Value, Value] | None = None
    pinned: bool = False

    @property
    def known(self) -> bool:
        """Whether it is the same at every call with these shapes."""
        return self.constant is not _UNKNOWN


@dataclass
class Draft:
    """A step before its memory is planned."""

    name: str
    kernel: str
    launch: Launch | None = None
    operands: tuple[Buffer | Slot | int, ...] = ()
    function: Callable[..., object] | None = None
    arguments: tuple = ()
    out: Slot | None = None
    shape: tuple[int, ...] | None = None


Lowering = Callable[["Recorder", fx.Node, Operator], "Value | None"]


@dataclass
class Recorder:
    """Records a plan. Lowerings ask it for inputs and give it launches.

    Args:
        threads: threads that launches may use.
        lowerings: how operators run in panels, by class; None from one of them leaves its node to torch.
    """

    threads: int
    lowerings: dict[type[Operator], Lowering]
    values: dict[fx.Node, Value] = field(default_factory=dict)
    drafts: list[Draft] = field(default_factory=list)
    env: list[object] = field(default_factory=list)
    keep: list[object] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    seen: dict[Value, object] = field(default_factory=dict)

    # What lowerings use -----------------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Value:
        return self.values[node]

    def buffer(self, layout: Layout) -> Buffer:
        """Memory for one activation; zeros while recording, so that padding lanes are finite."""
        memory = floats(layout.nbytes // 4 + ALIGN // 4).zero_()
        buffer = Buffer(layout.nbytes, keep=memory)
        buffer.address = -(-memory.data_ptr() // ALIGN) * ALIGN
        self.buffers.append(buffer)
        return buffer

    def address(self, tensor: Tensor | None) -> int:
        """Where a constant lies; it is kept alive as long as the plan. None lies at 0."""
        if tensor is None:
            return 0
        self.keep.append(tensor)
        return tensor.data_ptr()

    def launch(self, name: str, kernel: str, launch: Launch, *operands: Buffer | Slot | int) -> None:
        """Add a kernel call, the address it writes to among its operands, and run it."""
        draft = Draft(name, kernel, launch=launch, operands=operands)
        self._add(draft)
        launch.run(*(self.address_now(x) for x in operands))

    def function(self, name: str, kernel: str, function: Callable[..., object], *arguments: object) -> Value:
        """Add a call of a function of tensors; values among the arguments become its tensors."""
        out = self.slot()
        tree = pytree.tree_map(self._argument, arguments)
        self._add(Draft(name, kernel, function=function, arguments=tree, out=out))
        self.env[out.index] = function(*pytree.tree_map(self._now, tree))
        return Value(slot=out)

    def into_rows(self, name: str, launch: Launch, source: Buffer, shape: tuple[int, ...]) -> Slot:
        """Add a kernel call that writes a new tensor of this shape from panels."""
        out = self.slot()
        self._add(Draft(name, "to rows", launch=launch, operands=(source, out), out=out, shape=shape))
        tensor = floats(*shape)
        self.env[out.index] = tensor
        launch.run(source.address, tensor.data_ptr())
        return out

    def slot(self) -> Slot:
        self.env.append(None)
        return Slot(len(self.env) - 1)

    def tensor(self, value: Value) -> Tensor:
        """The tensor that a value holds in this run, its panels written out as rows where need be."""
        if value.known:
            return value.constant  # type: ignore[return-value]
        if value.slot is None:
            value.slot = self.lowerings["rows"](self, value)  # type: ignore[index]
        return self.env[value.slot.index]  # type: ignore[return-value]

    # Recording --------------------------------------------------------------------------------------------------

    def record(self, node: fx.Node) -> Value:
        """Run one node."""
        target = node.target
        if isinstance(target, Operator):
            lowering = self.lowerings.get(type(target))
            inputs = [self.values[a] for a in node.args if isinstance(a, fx.Node)]
            if lowering is not None and not all(v.known for v in inputs):
                found = lowering(self, node, target)
                if found is not None:
                    return found
        return self._by_torch(node)

    def _by_torch(self, node: fx.Node) -> Value:
        # A view fits the strides that the exporter saw, which need not be those of the operator before it here.
        viewing = node.target in (ATEN.view.default, ATEN._unsafe_view.default)
        target = ATEN.reshape.default if viewing else node.target
        args = pytree.tree_map(lambda a: self.values[a] if isinstance(a, fx.Node) else a, node.args)
        kwargs = pytree.tree_map(lambda a: self.values[a] if isinstance(a, fx.Node) else a, node.kwargs)
        leaves = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Value)]
        if target is ATEN.sym_size.int or all(v.known for v in leaves):
            return Value(constant=self._constant(target, args, kwargs))
        if (shorter := self._without_all_true(target, leaves)) is not None:
            return shorter
        name = getattr(target, "__name__", str(target))
        if kwargs:
            return self.function(node.name, f"torch {name}", _Keywords(target), args, kwargs)
        value = self.function(node.name, f"torch {name}", target, *args)
        if target is ATEN.__and__.Tensor and len(leaves) == 2:
            value.both = (leaves[0], leaves[1])
            leaves[0].pinned = leaves[1].pinned = True
        return value

    def _constant(self, target: Callable, args: tuple, kwargs: dict) -> object:
        def now(x: object) -> object:
            return self.tensor(x) if isinstance(x, Value) else x

        return target(*pytree.tree_map(now, args), **pytree.tree_map(now, kwargs))

    def _without_all_true(self, target: object, leaves: Sequence[Value]) -> Value | None:
        """`all_true & mask` is the mask, only larger: kept as a view, so that it stays the same for all queries."""
        if target is not ATEN.__and__.Tensor or len(leaves) != 2:
            return None
        for one, other in (leaves, leaves[::-1]):
            if one.known and isinstance(one.constant, Tensor) and bool(one.constant.all()):
                shape = torch.broadcast_shapes(one.constant.shape, self.tensor(other).shape)
                value = self.function("mask", "view", torch.Tensor.expand, other, list(shape))
                value.both = other.both
                return value
        return None

    def _argument(self, x: object) -> object:
        if not isinstance(x, Value):
            return x
        if x.known:
            return x.constant
        self.tensor(x)
        return x.slot

    def _now(self, x: object) -> object:
        return self.env[x.index] if isinstance(x, Slot) else x

    def address_now(self, x: Buffer | Slot | int) -> int:
        if isinstance(x, Slot):
            return self.env[x.index].data_ptr()  # type: ignore[union-attr]
        return x.address if isinstance(x, Buffer) else x

    def _add(self, draft: Draft) -> None:
        for operand in draft.operands:
            if isinstance(operand, Buffer):
                operand.seen(len(self.drafts))
        self.drafts.append(draft)


class _Keywords:
    """Calls a function with positional and keyword arguments given as two."""

    def __init__(self, target: Callable) -> None:
        self.target = target

    def __call__(self, args: tuple, kwargs: dict) -> object:
        return self.target(*args, **kwargs)
