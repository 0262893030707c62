"""One training run in memory: what has a state, what a step does, what is told of it in the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..attach import Handle, attach
from ..attach.meter import Meter
from ..attach.targets import find
from ..core.errors import NonFiniteError, TargetError
from .plan import Plan
from .trained import WEIGHTS, TrainedLayer, TrainedRun, read_trained

if TYPE_CHECKING:
    from ..data.tasks import Batch, Task

POINTS = 200
COUNTS = ("step", "seconds", "processor", "interruptions")


class Training:
    """A network, its optimizer, rate and handle, step by step; everything that has a state."""

    def __init__(self, task: Task, plan: Plan) -> None:
        self.task, self.plan = task, plan
        torch.manual_seed(plan.seed)
        self.model = task.build()
        self.start_flops = _start(self.model, plan)
        self.device = _usable(plan.device)
        self.model.to(self.device)
        self.optimizer = _optimizer(self.model, plan)
        every = find(self.model, ("*",)).targets
        self.outputs = {t.name: t.weight(self.model).shape[0] for t in every}
        self.handle = self._attach()
        held = {t.name for t in self.handle.targets} if self.handle else set()
        self.free = [t for t in every if t.name not in held]
        self.meter = Meter(self.model, self.free)
        self.rate = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, plan.steps)
        self.step, self.seconds, self.processor, self.interruptions = 0, 0.0, 0.0, 0
        self.loss = float("nan")
        self.curve: list[tuple[int, float, float]] = []

    def advance(self) -> None:
        """One optimizer step."""
        began, worked = time.perf_counter(), time.process_time()
        inputs, targets = self._batch(self.step)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model.train()(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.rate.step()
        if self.handle is not None:
            self.handle.step()
        self.meter.add_dense()
        self.step, self.loss = self.step + 1, loss.item()
        self.seconds += time.perf_counter() - began
        self.processor += time.process_time() - worked
        if not math.isfinite(self.loss):
            raise NonFiniteError(
                f"the loss is {self.loss} after step {self.step}; lower rate= (it is {self.plan.rate})"
            )
        if self.step % max(self.plan.steps // POINTS, 1) == 0:
            self.curve.append((self.step, self.loss, self.density))

    @property
    def density(self) -> float:
        """Share kept of the layers held sparse; 1 where none is."""
        return self.handle.density if self.handle else 1.0

    def state(self) -> dict[str, object]:
        """All that the rest of the run depends on."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        counts = {name: getattr(self, name) for name in COUNTS}
        return {**parts, **counts, "curve": self.curve, "random": self._random()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for name in COUNTS:
            setattr(self, name, state[name])
        self.curve = [tuple(point) for point in state["curve"]]
        torch.set_rng_state(state["random"][0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"][1], self.device)

    def _random(self) -> list[Tensor]:
        on_gpu = self.device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if on_gpu else [])]

    def _batch(self, step: int) -> Batch:
        inputs, targets = self.task.batch(step, self.plan.batch, self.plan.seed)
        return inputs.to(self.device), targets.to(self.device)

    def _attach(self) -> Handle | None:
        plan = self.plan
        if plan.method == "dense":
            return None
        where = {"targets": plan.targets, "skip": plan.skip, "allocation": plan.allocation, "backend": plan.backend}
        # For methods that try the model out first; a run that goes on tries it out in the same way.
        trial = {"data": self._batch(0), "loss": self.task.loss}
        asked = {"density": plan.density, "total_steps": plan.steps, **trial, **where, **plan.options}
        return attach(self.model, plan.method, optimizer=self.optimizer, **asked)  # type: ignore[arg-type]

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "rate": self.rate, "meter": self.meter}
        return parts if self.handle is None else {**parts, "handle": self.handle}

    def close(self) -> TrainedRun:
        """Take the masks away, and tell of the run."""
        report = self.handle.report() if self.handle else None
        size, outputs = self.meter.sizes, self.outputs
        free = {t.name: TrainedLayer(t.name, size[t.name], size[t.name], outputs[t.name]) for t in self.free}
        kept = {
            r.name: TrainedLayer(r.name, r.kept, r.size, outputs[r.name], r.dead_outputs, r.dead_inputs)
            for r in report or ()
        }
        spent = [self.meter.flops(), *([report.flops] if report else [])]
        if self.handle is not None:
            self.handle.remove()
        self.model.cpu()  # the tasks' test data are there
        parameters = list(self.model.parameters())
        return TrainedRun(
            plan=json.loads(json.dumps(self.plan.to_dict())),
            title=self.task.title,
            quality=self.task.measure(self.model.eval()),
            quality_label=self.task.quality,
            higher_is_better=self.task.higher_is_better,
            nonzeros=sum(int(p.count_nonzero()) for p in parameters),
            parameters=sum(p.numel() for p in parameters),
            layers=tuple({**kept, **free}[name] for name in self.outputs),
            flops=sum(f.forward + f.backward for f in spent),
            dense_flops=sum(f.dense for f in spent),
            start_flops=self.start_flops,
            seconds=self.seconds,
            interruptions=self.interruptions,
            churned=report.sad if report else 0,
            curve=tuple(self.curve),
            torch_version=torch.__version__,
            threads=torch.get_num_threads(),
            processor_seconds=self.processor,
        )


def _start(model: nn.Module, plan: Plan) -> int:
    """Load an earlier run's weights, if the plan starts from one; returns what they had cost. Unit: FLOPs."""
    if not plan.start:
        return 0
    earlier = read_trained(plan.start)
    if earlier.plan["task"] != plan.task:
        raise TargetError(
            f"{plan.start} trained {earlier.plan['task']!r}, this run is {plan.task!r}; start from its own"
        )
    model.load_state_dict(load_file(Path(plan.start) / WEIGHTS))
    return earlier.cost


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    if plan.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), plan.rate, momentum=0.9, weight_decay=plan.decay)
    return torch.optim.AdamW(model.parameters(), plan.rate, weight_decay=plan.decay)


def _usable(name: str) -> torch.device:
    """The device, after a look whether it is there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise TargetError(
            f"device {name!r} cannot be used here ({error}); leave it out to use the processor"
        ) from error
