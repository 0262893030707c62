"""compile: a whole network as one list of kernel calls on panels."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.errors import GossamerError
from ..deploy.examples import TOLERANCE, Example, difference, tensors
from ..deploy.layers import packed_layers
from ..deploy.unpack import unpack
from ..kernels.cpu.trial import need_kernels
from ..kernels.tuning import recall, remember
from . import planes, tokens
from .capture import Call, Captured, CaptureError, capture
from .layouts import Tokens
from .operators import Attention, Combine, GlobalPool, Norm, Pool, Product, Rotary
from .passes import simplify
from .plan import Plan
from .recorder import Recorder, Value
from .shelf import Shelf
from .weights import Weights

# Plans kept at rest per set of shapes, sets of shapes, and bytes of all plans: each owns memory for its activations.
MOST_AT_REST, MOST_SHAPES, MOST_BYTES = 4, 32, 1 << 30
# Networks followed anew for sizes that may take another way: each owns the forms of its weights.
MOST_WAYS = 4
# Compiles the same model on another call.
Another = Callable[[Call], "Compiled"]
# Plans whose runs are this short are tried on one thread, too.
SHORT_SECONDS = 5e-3


def compile(model: nn.Module, example: Example, *, remeasure: bool = False) -> Compiled:
    """Follow a sparse network as a whole and run it as one list of kernel calls.

    Between layers activations stay in the layout that the sparse products read; bias, batch norm, activation and
    residual sums are part of the products; attention, norms and pooling are kernels on the same layout. What has no
    kernel here is called as torch has it. Each product measures which form of its weight is fastest on the shapes
    it meets, and the machine remembers it. Sizes that the model leaves open, batch and length, stay open; a plan is
    made for each set of sizes that comes by. Where a size was only seen not to be some number, or no multiple of one,
    the model is followed anew at calls for which it is.

    Args:
        model: pruned (zeros in its weights) or packed; it is not changed. Compile again once it has changed.
        example: one call of the model, as for `pack`.
        remeasure: measure also what this machine remembers, as every benchmark must.

    Returns:
        A module to call like the model, for inference on the CPU in float32. `.explain()` shows the plan.

    Raises:
        CaptureError: the model cannot be followed as one graph, or draws random numbers, writes its own buffers, or
            makes tensors whose sizes depend on values.
        GossamerError: the model or the example is not on the CPU.
        NonFiniteError: a weight holds NaN or infinity.
        DispatchError: no kernel can be compiled here; the reason is given.

    Departs from `torch.compile`: no compiler is called, weights are constants, and sparse ones pay.

    Example:
        >>> fast = compile(model, batch)  # doctest: +SKIP
        >>> fast(**batch)  # doctest: +SKIP
    """
    need_kernels("compile", "run the model as pack leaves it, layer by layer, or as it is")
    call = Call.of_example(example)
    _need_cpu(model, call)
    return _followed(model, remeasure, call, another=partial(_followed, model, remeasure))


def _followed(model: nn.Module, remeasure: bool, call: Call, another: Another | None = None) -> Compiled:
    """The model compiled on a call, and checked on it."""
    model = _plain(model)
    args, kwargs = call.arguments()
    with torch.no_grad():
        want = list(tensors(model(*args, **kwargs)))
    compiled = Compiled(capture(model, call), type(model).__name__, remeasure=remeasure, another=another)
    got = list(tensors(compiled(*args, **kwargs)))
    off = difference(got, want)
    if off > 10 * TOLERANCE[torch.float32]:
        raise CaptureError(f"the compiled {type(model).__name__} is off by {off:.1e} on the example; run it as it is")
    return compiled


def _plain(model: nn.Module) -> nn.Module:
    """The model with dense layers, at rest; packed ones are unpacked on a copy."""
    if any(True for _ in packed_layers(model)):
        return unpack(copy.deepcopy(model)).eval()
    if any(module.training for module in model.modules()):
        model = copy.deepcopy(model).eval()
    return model


def _need_cpu(model: nn.Module, call: Call) -> None:
    """Raise for what lies elsewhere."""
    given = [("the example", tensor) for tensor in call.tensors]
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *given]:
        if tensor.device.type != "cpu":
            raise GossamerError(f"compile runs on the CPU; {name} is on {tensor.device}: bring model and example there")


class Compiled(nn.Module):
    """A network followed as a whole; made by `compile`. Calls may come from several threads at once."""

    def __init__(
        self, captured: Captured, name: str, *, remeasure: bool = False, another: Another | None = None
    ) -> None:
        super().__init__()
        self.captured, self.name, self.remeasure = captured, name, remeasure
        self._another, self._ways, self._following = another, [], threading.Lock()
        self.passes = simplify(captured.graph, captured.constants)
        self._weights: dict[int, Weights] = {}
        self._threads: dict[tuple, int] = {}
        self._shelf = Shelf(each=MOST_AT_REST, keys=MOST_SHAPES, nbytes=MOST_BYTES)
        self._lock = threading.Lock()
        self._lowerings = {
            Product: self._product,
            Norm: tokens.norm,
            Attention: tokens.attention,
            Combine: tokens.combine,
            Rotary: tokens.rotary,
            Pool: planes.pool,
            GlobalPool: planes.global_pool,
            "rows": _to_rows,
        }
        self.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __deepcopy__(self, memo: dict) -> Compiled:
        return self  # nothing about it changes

    def __getstate__(self) -> dict:
        raise GossamerError(f"the compiled {self.name} is not saved; save the packed model, load and compile it")

    def forward(self, *args: object, **kwargs: object) -> object:
        call = Call.of(args, kwargs)
        way, key, plan = self._taken(call)
        with torch.no_grad():
            outputs = plan.run(call.tensors)
        way._shelf.put(key, plan)
        return pytree.tree_unflatten(outputs, way.captured.out_spec)

    def _taken(self, call: Call) -> tuple[Compiled, tuple, Plan]:
        """A plan that serves a call and that nobody else runs, and where to put it back."""
        self._check(self.captured.refuse(call))
        # Expanded tensors are a case of their own: a plan may rely on one value standing for a whole axis.
        layouts = tuple((t.shape, tuple(step == 0 for step in t.stride())) for t in call.tensors)
        key = (torch.get_num_threads(), layouts)
        plan = self._shelf.take(key)
        if plan is None:
            if (reason := self.captured.decides(call)) is not None:
                return self._other_way(call, reason)._taken(call)
            with torch.no_grad():
                plan = self._fastest(key, call.tensors)
        return self, key, plan

    def _other_way(self, call: Call, reason: str) -> Compiled:
        """The model followed anew on a call, where all that is known of its sizes is that they may make a difference.

        That a size is not some number is noted for a branch not taken, and by the exporter for a table not used to
        its end, where nothing depends on it; looking again is what tells them apart.
        """
        with self._following:
            for way in self._ways:
                if way.captured.refuse(call) is None and way.captured.decides(call) is None:
                    return way
            if "!=" not in reason or self._another is None or len(self._ways) == MOST_WAYS:
                self._check(reason)
            self._ways.append(self._another(call))
            return self._ways[-1]

    def _check(self, reason: str | None) -> None:
        if reason is not None:
            raise GossamerError(f"{self.name} was compiled for another call: {reason}; compile it for this one")

    def _fastest(self, key: tuple, inputs: Sequence[Tensor]) -> Plan:
        """A new plan; where runs are short, on as many threads as make it fastest, for sharing has its price.

        What was found is kept: callers at the same time get plans alike, which add in the same order.
        """
        if key in self._threads:
            return self._plan(self._threads[key], inputs)
        plan, asked = self._plan(key[0], inputs), key[0]
        found = self._threads.setdefault(key, 1 if asked > 1 and self._alone_wins(plan, inputs) else asked)
        return plan if found == asked else self._plan(found, inputs)

    def _alone_wins(self, plan: Plan, inputs: Sequence[Tensor]) -> bool:
        """Whether one thread is faster than those of a plan."""
        key = self._key(plan, inputs)
        known = None if self.remeasure else recall("threads", key, _yes_or_no)
        if known is None:
            together = _shortest(plan, inputs)
            known = together <= SHORT_SECONDS and _shortest(self._plan(1, inputs), inputs) < together
            remember("threads", key, known)
        return known

    def _key(self, plan: Plan, inputs: Sequence[Tensor]) -> dict[str, object]:
        """What tells this network at these sizes from others."""
        weights = sorted((*w.w_MK.shape, round(100 * w.density)) for w in self._weights.values())
        steps = [(step.name, step.kernel) for step in plan.steps]
        shapes = [tuple(t.shape) for t in inputs]
        return {"steps": steps, "weights": weights, "inputs": shapes, "threads": torch.get_num_threads()}

    def _plan(self, threads: int, inputs: Sequence[Tensor]) -> Plan:
        c = self.captured
        return Plan(c.graph, c.constants, c.inputs, inputs, threads=threads, lowerings=self._lowerings)

    def _product(self, rec: Recorder, node, op: Product) -> Value | None:
        # Layers that share a weight share its forms.
        with self._lock:
            if id(op.weight) not in self._weights:
                self._weights[id(op.weight)] = Weights(
                    op.matrix, op.name, taps=op.weight.shape[2:].numel(), remeasure=self.remeasure
                )
        weights = self._weights[id(op.weight)]
        if op.geometry is not None:
            return planes.product(rec, node, op, weights)
        return tokens.product(rec, node, op, weights)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as laid out."""
        return sum(w.nbytes for way in (self, *self._ways) for w in way._weights.values())

    def _choices(self) -> list[str]:
        """How the forms of the weights were found, where there was something to choose."""
        known = list(self._weights.values())
        now, earlier = sum(w.measured for w in known), sum(w.recalled for w in known)
        return [f"  forms of weights: {now} measured now, {earlier} measured earlier"] if now + earlier else []

    def explain(self, example: Example) -> str:
        """The plan for a call like this one, and where its time goes."""
        call = Call.of_example(example)
        way, key, plan = self._taken(call)
        with torch.no_grad():
            timed = plan.profile(call.tensors)
        way._shelf.put(key, plan)
        total = sum(ms for _, ms in timed)
        lines = [f"{self.name}: {len(timed)} steps, {total:.3f} ms, {plan.arena.nbytes / 1e6:.1f} MB of activations"]
        lines += way._choices()
        lines += [f"  {ms:8.4f} ms {ms / total:6.1%}  {step.name:<48} {step.kernel}" for step, ms in timed]
        return "\n".join(lines)


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _shortest(plan: Plan, inputs: Sequence[Tensor], runs: int = 10) -> float:
    """Seconds of the shortest of some runs."""
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        plan.run(inputs)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _to_rows(rec: Recorder, value: Value):
    return tokens.to_rows(rec, value) if isinstance(value.layout, Tokens) else planes.to_images(rec, value)
