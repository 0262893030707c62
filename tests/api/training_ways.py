"""A small net, every registered method that trains, and the ways people train: what the resumption tests walk over."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gossamer
from gossamer.attach import Handle
from gossamer.core import Method, methods

STEPS = 10
# Options of methods whose defaults are for long runs, or that need more than a density.
OWN: dict[str, dict[str, object]] = {"fast_sparse_convnets": {"pattern": "unstructured"}}
OWN |= {"g2gnet": {"groups": 4, "fraction": 0.3}}
OWN |= {name: {"pattern": "1:4"} for name in ("sr_ste", "decaying_mask", "decaying_structure", "bdwp")}
SHORT = {"total_steps": STEPS, "density": 0.25, "every": 2}


def options(method: Method) -> dict[str, object]:
    """What attach is called with: those of `SHORT` that the method has, and its own."""
    known = inspect.signature(method.build).parameters
    return {k: v for k, v in SHORT.items() if k in known} | OWN.get(method.name, {})


def training_methods() -> Iterator[str]:
    """Every registered method that attach takes as it is; calibration and solvers belong to `prune`."""
    for name, method in methods().items():
        sparsifier = method(**options(method))
        if (sparsifier.probe or not sparsifier.needs) and not sparsifier.solve:
            yield name


def net() -> nn.Sequential:
    """Convolution, batch statistics, dropout (so that the random state matters), a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(128, 16)
    )


def loss(model: nn.Module, step: int) -> torch.Tensor:
    """Of the batch of this step."""
    x = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(step))
    return (model(x).float() - x.flatten(1)[:, :16]).square().mean()


@dataclass
class Training:
    """One run: what is trained, and all that has a state."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    handle: Handle
    called: nn.Module
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    mean: AveragedModel | None = None
    parts: int = 1
    bfloat16: bool = False

    def run(self, steps: range) -> None:
        """Train."""
        for step in steps:
            self.optimizer.zero_grad()
            for part in range(self.parts):
                with torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else nullcontext():
                    value = loss(self.called, self.parts * step + part) / self.parts
                self.scaler.scale(value).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.handle.step()
            if self.mean is not None:
                self.mean.update_parameters(self.model)

    def state(self) -> dict[str, object]:
        """Everything, plain enough for torch.load(weights_only=True)."""
        held = {n: part.state_dict() for n, part in self._parts().items()}
        return held | {"random": torch.get_rng_state()}

    def load(self, state: dict[str, object]) -> None:
        """Go on from there."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])

    def _parts(self) -> dict[str, object]:
        named = {"model": self.model, "optimizer": self.optimizer, "handle": self.handle, "scaler": self.scaler}
        return named if self.mean is None else {**named, "mean": self.mean}


def _groups(model: nn.Module) -> torch.optim.Optimizer:
    """Weights decay, the rest does not."""
    wide = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": rest, "lr": 0.05, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def begin(method: str, make: Callable[[nn.Module], torch.optim.Optimizer] = _sgd, **how: object) -> Training:
    """Attach and go."""
    model = net()
    optimizer = make(model)
    shown = {"data": (torch.ones(4, 4, 4, 4), torch.arange(4)), "loss": nn.functional.cross_entropy}
    handle = gossamer.attach(model, method, optimizer=optimizer, **shown, **options(methods()[method]))
    return Training(model, optimizer, handle, **{"called": model, **how})


def _averaged(method: str) -> Training:
    run = begin(method)
    run.mean = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return run


def _compiled(method: str) -> Training:
    torch._dynamo.reset()
    run = begin(method)
    run.called = torch.compile(run.model, backend="aot_eager", fullgraph=True)
    return run


WAYS: dict[str, Callable[[str], Training]] = {
    "momentum and decay": begin,
    "parameter groups, AdamW": lambda method: begin(method, _groups),
    "average of weights": _averaged,
    "bfloat16 autocast": lambda method: begin(method, bfloat16=True),
    "gradient scaler": lambda method: begin(method, scaler=torch.amp.GradScaler("cpu", 1024.0, growth_interval=3)),
    "accumulation": lambda method: begin(method, parts=3),
    "compiled": _compiled,
}
