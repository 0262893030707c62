"""Plan: one way through a graph for one set of input shapes, recorded once and replayed at every call.

Recording runs the graph node by node on a real call. Whatever does not depend on the inputs is computed there and
kept; operators with kernels of ours become launches on panels; all others are called as torch has them. Then the
panels' memory is planned, and a replay is the list of what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..kernels.cpu.launch import Launch
from ..kernels.cpu.memory import floats
from .dense import DenseProduct
from .layouts import Layout
from .memory import ALIGN, Buffer, assign
from .operators import Operator
from .sequence import NativeSequence, Place, opening, scratch_needed
from .weights import Form

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


@dataclass(frozen=True)
class Step:
    """One thing a run does.

    Args:
        name: of the layer or operator, for people.
        kernel: what computes it.
        run: called with the run's slots.
    """

    name: str
    kernel: str
    run: Callable[[list], None]


@dataclass
class _Draft:
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
    drafts: list[_Draft] = field(default_factory=list)
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
        draft = _Draft(name, kernel, launch=launch, operands=operands)
        self._add(draft)
        launch.run(*(self.address_now(x) for x in operands))

    def function(self, name: str, kernel: str, function: Callable[..., object], *arguments: object) -> Value:
        """Add a call of a function of tensors; values among the arguments become its tensors."""
        out = self.slot()
        tree = pytree.tree_map(self._argument, arguments)
        self._add(_Draft(name, kernel, function=function, arguments=tree, out=out))
        self.env[out.index] = function(*pytree.tree_map(self._now, tree))
        return Value(slot=out)

    def into_rows(self, name: str, launch: Launch, source: Buffer, shape: tuple[int, ...]) -> Slot:
        """Add a kernel call that writes a new tensor of this shape from panels."""
        out = self.slot()
        self._add(_Draft(name, "to rows", launch=launch, operands=(source, out), out=out, shape=shape))
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

    def _add(self, draft: _Draft) -> None:
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


class Plan:
    """A recorded way through the graph. One run at a time; `Compiled` keeps one plan for each call under way.

    Args:
        graph: the simplified graph.
        constants: its constants.
        inputs: names of the placeholders that get the call's tensors.
        tensors: the call to record.
        threads: as torch's setting.
        lowerings: as for `Recorder`.

    Attributes:
        arena: memory of all activations in panels.
        nbytes: what the plan holds beside weights and their forms.
    """

    def __init__(
        self, graph: fx.Graph, constants: dict[str, Tensor], inputs: Sequence[str], tensors: Sequence[Tensor],
        *, threads: int, lowerings: dict,
    ) -> None:  # fmt: skip
        rec = Recorder(threads, lowerings)
        slots = {name: rec.slot() for name in inputs}
        for name, tensor in zip(inputs, tensors):
            rec.env[slots[name].index] = tensor
        left = {node: len(node.users) for node in graph.nodes}
        self.outputs: list[Slot | object] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                known = Value(constant=constants.get(node.name))
                rec.values[node] = Value(slot=slots[node.name]) if node.name in slots else known
            elif node.op == "output":
                given = {tensor.untyped_storage().data_ptr() for tensor in tensors}
                self.outputs = [self._output(rec, leaf, given) for leaf in pytree.tree_leaves(node.args[0])]
            else:
                rec.values[node] = rec.record(node)
                _forget_inputs(rec, node, left)
        rec.drafts = _needed(rec.drafts, self.outputs)
        self.inputs, self.size, self.keep = [slots[n].index for n in inputs], len(rec.env), rec.keep
        # Zeros: lanes beyond the last position hold finite numbers whatever was there before.
        self.arena = torch.zeros(assign(rec.buffers) + ALIGN, dtype=torch.uint8, device="cpu")
        base = -(-self.arena.data_ptr() // ALIGN) * ALIGN
        for buffer in rec.buffers:
            buffer.address, buffer.keep = base + buffer.offset, None
        self.steps = [Step(d.name, d.kernel, _bound(d)) for d in rec.drafts]
        scratch = max((scratch_needed(d.launch, threads) for d in rec.drafts if d.launch), default=0)
        self.scratch = torch.empty(scratch + ALIGN, dtype=torch.uint8, device="cpu")
        self.program = _program(rec.drafts, -(-self.scratch.data_ptr() // ALIGN) * ALIGN, threads)
        self.nbytes = self.arena.nbytes + self.scratch.nbytes + _own_bytes(rec, constants)

    @staticmethod
    def _output(rec: Recorder, leaf: object, given: set[int]) -> object:
        if not isinstance(leaf, fx.Node):
            return leaf
        value = rec.values[leaf]
        found = rec.tensor(value)
        if isinstance(found, Tensor) and (value.known or found.untyped_storage().data_ptr() in given):
            # The caller may write into what it gets, but not thereby into weights or its own inputs.
            return rec.function(leaf.name, "copy", torch.Tensor.clone, value).slot
        return value.constant if value.known else value.slot

    def run(self, tensors: Sequence[Tensor]) -> list[object]:
        """The outputs, flat; new tensors at every call."""
        env: list[object] = [None] * self.size
        for index, tensor in zip(self.inputs, tensors):
            env[index] = tensor
        for run in self.program:
            run(env)
        return [env[out.index] if isinstance(out, Slot) else out for out in self.outputs]

    def profile(self, tensors: Sequence[Tensor], runs: int = 20) -> list[tuple[Step, float]]:
        """Median milliseconds of each step."""
        taken: list[list[float]] = [[] for _ in self.steps]
        for _ in range(runs):
            env: list[object] = [None] * self.size
            for index, tensor in zip(self.inputs, tensors):
                env[index] = tensor
            for step, times in zip(self.steps, taken):
                began = time.perf_counter()
                step.run(env)
                times.append(1e3 * (time.perf_counter() - began))
        return [(step, sorted(times)[len(times) // 2]) for step, times in zip(self.steps, taken)]


def _forget_inputs(rec: Recorder, node: fx.Node, left: dict[fx.Node, int]) -> None:
    """Drop the recording's own memory of values that no later node reads."""
    for source in node.all_input_nodes:
        left[source] -= 1
        value = rec.values[source]
        if left[source] == 0 and not value.known and source.op != "placeholder":
            if value.buffer is not None:
                value.buffer.keep = None
            if value.slot is not None and not value.pinned:
                rec.env[value.slot.index] = None


def _needed(drafts: list[_Draft], outputs: Sequence[object]) -> list[_Draft]:
    """The steps whose tensors are read by later ones or are outputs; kernels that write panels always are."""
    wanted = {out.index for out in outputs if isinstance(out, Slot)}
    kept = []
    for draft in reversed(drafts):
        if draft.out is not None and draft.out.index not in wanted:
            continue
        read = [*draft.operands, *pytree.tree_leaves(draft.arguments)]
        wanted |= {x.index for x in read if isinstance(x, Slot)}
        kept.append(draft)
    return kept[::-1]


def _own_bytes(rec: Recorder, constants: dict[str, Tensor]) -> int:
    """Bytes of what the steps read that only this plan has: tables and masks, not weights and their forms."""
    shared = _storages([*constants.values(), *(x.stream.values_EG for x in rec.keep if isinstance(x, Form))])
    read = [rec.keep, [d.arguments for d in rec.drafts], [d.launch.holds for d in rec.drafts if d.launch]]
    own = [nbytes for at, nbytes in _storages(pytree.tree_leaves(read)).items() if at not in shared]
    return sum(own) + sum(d.function.nbytes for d in rec.drafts if isinstance(d.function, DenseProduct))


def _storages(found: Iterable[object]) -> dict[int, int]:
    """Address and bytes of what ordinary tensors lie in."""
    strided = [x.untyped_storage() for x in found if isinstance(x, Tensor) and x.layout is torch.strided]
    return {s.data_ptr(): s.nbytes() for s in strided}


def _program(drafts: list[_Draft], scratch_at: int, threads: int) -> list[Callable[[list], None]]:
    """What a run calls: functions of torch's one by one, kernels between them in one native sequence each."""
    program: list[Callable[[list], None]] = []
    calls: list[tuple[Launch, list[int | Place]]] = []

    def close() -> None:
        if calls:
            program.append(NativeSequence(list(calls), scratch_at, threads).run)
            calls.clear()

    for draft in drafts:
        if draft.launch is None:
            close()
            program.append(_bound(draft))
            continue
        if draft.shape is not None:
            # The tensor must be there before the sequence starts; nothing in between asks for it.
            program.append(opening(draft.out.index, draft.shape))  # type: ignore[union-attr]
        calls.append((draft.launch, [_operand(x) for x in draft.operands]))
    close()
    return program


def _operand(x: Buffer | Slot | int) -> int | Place:
    if isinstance(x, Slot):
        return Place(x.index)
    return x.address if isinstance(x, Buffer) else x


def _bound(draft: _Draft) -> Callable[[list], None]:
    if draft.function is not None:
        return _function_step(draft.function, draft.arguments, draft.out.index)  # type: ignore[union-attr]
    run, operands = draft.launch.run, draft.operands  # type: ignore[union-attr]
    if draft.shape is not None:
        return _rows_step(run, operands[0].address, draft.out.index, draft.shape)  # type: ignore[union-attr]
    fixed = tuple(x.address if isinstance(x, Buffer) else x for x in operands)
    if any(isinstance(x, Slot) for x in fixed):
        return lambda env: run(*(env[x.index].data_ptr() if isinstance(x, Slot) else x for x in fixed))
    return lambda env: run(*fixed)


def _function_step(function: Callable, arguments: tuple, out: int) -> Callable[[list], None]:
    def flat(x: object) -> bool:
        return not isinstance(x, (list, tuple, dict)) or not any(isinstance(y, Slot) for y in pytree.tree_leaves(x))

    if all(flat(x) for x in arguments):

        def step(env: list) -> None:
            env[out] = function(*[env[x.index] if isinstance(x, Slot) else x for x in arguments])
    else:

        def step(env: list) -> None:
            now = pytree.tree_map(lambda x: env[x.index] if isinstance(x, Slot) else x, arguments)
            env[out] = function(*now)

    return step


def _rows_step(run: Callable, source: int, out: int, shape: tuple[int, ...]) -> Callable[[list], None]:
    def step(env: list) -> None:
        env[out] = tensor = floats(*shape)
        run(source, tensor.data_ptr())

    return step
