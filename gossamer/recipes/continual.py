"""Learning one task after the other: each has a sparse part of the network, and what it has learned stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attach.handle import Handle
from ..attach.targets import find
from ..attach.weights import attach
from ..core.errors import FileDamaged, TargetError
from ..core.registry import get_method
from ..core.support import Support
from .cycles import State


@dataclass(frozen=True)
class Learned:
    """A finished task.

    Args:
        supports: what it uses of each layer, in the layout its weight is stored in.
        rest: its own values of all else: biases, norms with their statistics, layers that are not sparse.
    """

    supports: Mapping[str, Support]
    rest: State


class Continual:
    """A network that learns tasks in turn, each under a mask of its own, by any method whose pruned weights are zero.

    Task k keeps a support M_k, which may hold weights of earlier tasks. Those are frozen, so they may be used but not
    changed: with O = M_0 ∪ … ∪ M_{k−1} the gradient is ∂L/∂w ⊙ (1 − O), and w ⊙ O is what was learned. Links that drop
    and grow move among all. At the end of the task the weights of M_k outside O are learned too. Task k is recalled as
    w ⊙ M_k; no task is ever forgotten, and backward transfer is exactly 0.

    All that is not a sparse weight belongs to each task by itself: biases, norms, and layers left out by `skip`, such
    as the output head, which is so a head per task. A task starts with those of the task before.

    Args:
        model: at its start. Weights that no task has learned begin each task at their values of now.
        targets, skip: sparse layers, as for `gossamer.attach`.
        seed: task k draws its lots from seed + k.

    Example:
        >>> learner = Continual(model, skip=["head"])  # doctest: +SKIP
        >>> for task in tasks:  # doctest: +SKIP
        ...     optimizer = torch.optim.Adam(model.parameters())
        ...     handle = learner.begin("set", density=0.2, optimizer=optimizer, total_steps=1000, every=400)
        ...     train(model, optimizer, handle, task)  # calls handle.step() after every optimizer step
        ...     learner.end()
        >>> accuracy(learner.recall(0), tasks[0])  # doctest: +SKIP

    Raises:
        TargetError: no layer to make sparse, or a name that matches none.

    Reference: Yildirim et al., Continual Learning with Dynamic Sparse Training, arXiv:2308.14831. Its growths are
        "set" with grow="random" or "unfired", "rigl" with "gradient" or "momentum"; allocation="erk" or "uniform".
    Departs from: counts are exact. In the official code biases and batch norms are shared and go on learning, so that
        it forgets a little; a learned link that comes in again is 0 in training and has its value when tested, here it
        has its value at once; weights that no task uses start later tasks at 0; the epoch with the best training
        accuracy is kept, here a task ends as its last step left it; growth by momentum under Adam divides by √v.
    """

    def __init__(
        self, model: nn.Module, *, targets: Iterable[str] = (), skip: Iterable[str] = (), seed: int = 0
    ) -> None:
        self.model, self.seed = model, seed
        self._layers = {t.name: t for t in find(model, tuple(targets), tuple(skip)).targets}
        self._weights = {n: self._weight(n).detach().clone() for n in self._layers}
        self._learned = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in self._weights.items()}
        self._tasks: list[Learned] = []
        self._handle: Handle | None = None

    @property
    def tasks(self) -> tuple[Learned, ...]:
        """Finished tasks, the first one first."""
        return tuple(self._tasks)

    @property
    def free(self) -> float:
        """Fraction of the sparse layers' weights that no task has learned."""
        size = sum(w.numel() for w in self._weights.values())
        return 1.0 - sum(int(m.sum()) for m in self._learned.values()) / max(size, 1)

    def begin(
        self,
        method: str = "set",
        *,
        density: float,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        allocation: str | Mapping[str, float] | None = None,
        **options: object,
    ) -> Handle:
        """Start the next task; train it, calling the handle's `step()` after every optimizer step, then call `end()`.

        Args:
            method: a registered method with its `options`: "set", "rigl", "static", "gradual_magnitude", ...
            density: fraction of each support, above 0 and up to 1.
            optimizer: of the model; best a new one for each task.
            total_steps: length of the task. Unit: optimizer steps.
            allocation: of the density over layers, see `gossamer.attach`.

        Raises:
            TargetError: a task is under way, the method lets pruned weights learn, or attach refuses.
            UnknownName: no such method, option or allocation.
            BudgetError: a density or a schedule out of range.
        """
        self._refuse_within_a_task()
        own = inspect.signature(get_method(method).build).parameters
        drawn = {"seed": self.seed + len(self._tasks)} if "seed" in own else {}
        self._write(self._weights, self._tasks[-1].rest if self._tasks else {})
        asked = {"density": density, "total_steps": total_steps, "allocation": allocation, **drawn, **options}
        handle = attach(self.model, method, optimizer=optimizer, targets=tuple(self._layers), **asked)
        try:
            handle.freeze({n: Support(m) for n, m in self._learned.items()}, self._weights)
        except TargetError:
            handle.remove()
            raise
        self._handle = handle
        return handle

    def end(self) -> None:
        """The task is done: what it has learned stays from now on. The model is left as `recall` would give it.

        Raises:
            TargetError: no task is under way, or its masks were taken away.
        """
        if self._handle is None:
            raise TargetError("no task is under way; call begin() before end()")
        handle, self._handle = self._handle, None
        if not handle.held:
            raise TargetError(
                "the task's masks were taken away, so it is lost: begin it anew, and leave remove() to end()"
            )
        supports = {n: Support(s.kept.clone()) for n, s in handle.supports().items()}
        handle.remove()
        for name, support in supports.items():
            self._learn(name, support.kept, self._weight(name).detach())
        self._tasks.append(Learned(supports, self._rest()))

    def recall(self, task: int) -> nn.Module:
        """Make the model what it was at the end of this task, and return it.

        Raises:
            TargetError: a task is under way, or there is no such task.
        """
        self._refuse_within_a_task()
        if not 0 <= task < len(self._tasks):
            raise TargetError(f"there is no task {task}; {len(self._tasks)} are finished, counted from 0")
        then = self._tasks[task]
        kept = {n: s.kept.to(self._weights[n].device) for n, s in then.supports.items()}
        self._write({n: w.masked_fill(~kept[n], 0) for n, w in self._weights.items()}, then.rest)
        return self.model

    def state_dict(self) -> dict[str, object]:
        """What earlier tasks have learned. Within a task also save the states of model, optimizer and handle."""
        tasks = [{"supports": {n: s.kept for n, s in t.supports.items()}, "rest": dict(t.rest)} for t in self._tasks]
        return {"weights": dict(self._weights), "learned": dict(self._learned), "tasks": tasks}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`. To go on within a task call `begin` as before, and load the other states then.

        Raises:
            TargetError: a task is under way.
            FileDamaged: the state is not that of a learner with these layers.
        """
        self._refuse_within_a_task()
        missing, weights = {"weights", "learned", "tasks"} - set(state), dict(state.get("weights", {}))  # type: ignore[call-overload]
        shapes = lambda named: {n: tuple(w.shape) for n, w in named.items()}
        if missing or shapes(weights) != shapes(self._weights):
            raise FileDamaged(
                f"this is no state of a learner with layers {', '.join(self._layers)}; pass what state_dict() returned"
            )
        learned, tasks = dict(state["learned"]), list(state["tasks"])  # type: ignore[call-overload]
        self._weights = {n: w.clone() for n, w in weights.items()}
        self._learned = {n: m.clone() for n, m in learned.items()}
        supports = lambda masks: {n: Support(m) for n, m in masks.items()}
        self._tasks = [Learned(supports(t["supports"]), t["rest"]) for t in tasks]

    def _learn(self, name: str, kept: Tensor, values: Tensor) -> None:
        """What a task kept and nothing had learned before is learned now."""
        weights, learned = self._weights[name].to(values.device), self._learned[name].to(values.device)
        self._weights[name] = values.where(kept & ~learned, weights)
        self._learned[name] = learned | kept

    def _weight(self, name: str) -> Tensor:
        return self._layers[name].stored(self.model)

    def _rest(self) -> State:
        """A copy of all parameters and buffers but the sparse weights, under whatever names they have."""
        sparse = {id(self._weight(n)) for n in self._layers}
        skip = {n for n, p in self.model.named_parameters(remove_duplicate=False) if id(p) in sparse}
        return {n: v.detach().clone() for n, v in self.model.state_dict().items() if n not in skip}

    def _write(self, weights: Mapping[str, Tensor], rest: State) -> None:
        with torch.no_grad():
            for name, w in weights.items():
                self._weight(name).copy_(w)
        self.model.load_state_dict(rest, strict=False)

    def _refuse_within_a_task(self) -> None:
        if self._handle is not None:
            raise TargetError(f"task {len(self._tasks)} is under way; call end() once it is trained")
