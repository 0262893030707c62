"""Plan: one way through a graph for one set of input shapes, recorded once and replayed at every call.

Recording (`recorder.py`) runs the graph on a real call. Then the panels' memory is planned, and a replay is the list
of what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..kernels.cpu.launch import Launch
from ..kernels.cpu.memory import floats
from .dense import DenseProduct
from .memory import ALIGN, Buffer, assign
from .recorder import Draft, Recorder, Slot, Value
from .sequence import NativeSequence, Place, opening, scratch_needed
from .weights import Form


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


def _needed(drafts: list[Draft], outputs: Sequence[object]) -> list[Draft]:
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


def _program(drafts: list[Draft], scratch_at: int, threads: int) -> list[Callable[[list], None]]:
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


def _bound(draft: Draft) -> Callable[[list], None]:
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
