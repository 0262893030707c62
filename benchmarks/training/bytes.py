"""Bytes per weight that each method takes while it trains, counted from the tensors that are alive.

Run: python -m benchmarks.training.bytes [--quick]
A network of three linear layers (1.6 million weights) under AdamW, batches of 8, so that activations are next to
nothing; density 0.1, or 2:4. "At rest" is between two steps, gradients freed. "Peak" is the most at any moment of four
steps, moves of links included: each operator's results are counted from when they are made until they are freed; what
an operator takes for itself meanwhile is not seen.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gossamer
from benchmarks.results import table, write_results
from gossamer.attach import Handle
from gossamer.core import methods

HEADS = ("method", "weights", "buffers", "optimizer's slots", "method's own", "at rest", "gradients", "peak")
STEPS, EVERY = 4, 2
NM = ("sr_ste", "decaying_mask", "decaying_structure", "bdwp")
OWN: dict[str, dict[str, object]] = {"fast_sparse_convnets": {"pattern": "unstructured"}}
NOTES = (
    "bytes per weight of the held layers, float32 under AdamW, density 0.1 or 2:4; linear layers without biases",
    "buffers: masks, 1 byte a weight; places of kept weights (sparse backend); the frozen weights of lottery_jackpots",
    "method's own: every other tensor that is alive between steps: scores, supports, counters",
    "peak: of four steps, moves of links included, with gradients; batches are small, so activations hardly count",
)


@dataclass(frozen=True)
class Line:
    """One method; all in bytes per weight."""

    method: str
    weights: float
    masks: float
    slots: float
    own: float
    gradients: float
    peak: float

    @property
    def rest(self) -> float:
        return self.weights + self.masks + self.slots + self.own

    def cells(self) -> list[str]:
        numbers = (self.weights, self.masks, self.slots, self.own, self.rest, self.gradients, self.peak)
        return [self.method, *(f"{x:.2f}" for x in numbers)]


class Alive(TorchDispatchMode):
    """Bytes of all storages that operators made and that are not freed yet, and the most there were."""

    def __init__(self, held: int) -> None:
        super().__init__()
        self.now = self.most = held
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, count: int) -> None:
        self.now -= count


def total(tensors: Iterable[Tensor], apart: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages behind tensors, each once, without those behind `apart`."""
    without = {x.untyped_storage().data_ptr() for x in apart}
    held = {s.data_ptr(): s.nbytes() for x in tensors if (s := x.untyped_storage()).data_ptr() not in without}
    return sum(held.values())


def living() -> list[Tensor]:
    """Every tensor that Python can reach, but for what compilers leave behind, which has no memory."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided]


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [nn.Linear(width, width, bias=False), nn.ReLU()]
    return nn.Sequential(nn.Linear(width // 2, width, bias=False), nn.ReLU(), *hidden, nn.Linear(width, 64, bias=False))


def options(name: str) -> dict[str, object]:
    """A method's own, for a run of a few steps."""
    known = inspect.signature(methods()[name].build).parameters
    usual = {"total_steps": 2 * STEPS, "every": EVERY, **({"pattern": "2:4"} if name in NM else {"density": 0.1})}
    return {k: v for k, v in usual.items() if k in known} | OWN.get(name, {})


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, name: str, batch: tuple, backend: str) -> Handle:
    trial = {"data": batch, "loss": functional.cross_entropy, "backend": backend}
    return gossamer.attach(model, name, optimizer=optimizer, **trial, **options(name))  # type: ignore[arg-type]


def measure(name: str, width: int, backend: str = "masked") -> Line:
    """Train a few steps and count."""
    others = living()
    model = network(width)
    weights = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batch = torch.randn(8, width // 2), torch.randint(64, (8,))
    handle = attached(model, optimizer, name, batch, backend) if name != "dense" else None

    def step() -> None:
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        if handle is not None:
            handle.step()

    step()
    optimizer.zero_grad()
    with Alive(total(living(), [*others, *batch])) as alive:
        for _ in range(STEPS):
            optimizer.zero_grad()
            step()
    gradients = total(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.zero_grad()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    slots = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    rest = total(living(), [*others, *batch, *parameters, *buffers, *slots])
    parts = (total(parameters), total(buffers), total(slots), rest, gradients, alive.most)
    return Line(name if backend == "masked" else f"{name}, sparse backend", *(x / weights for x in parts))


def trains(name: str) -> bool:
    """Methods that attach takes as they are; calibration and solvers belong to `prune`."""
    made = methods()[name](**options(name))
    return bool((made.probe or not made.needs) and not made.solve)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small network; writes no results")
    width = 64 if parser.parse_args().quick else 1024
    asked = [("dense", "masked"), *((n, "masked") for n in methods() if trains(n))]
    asked += [(n, "sparse") for n in ("static", "set", "rigl")]
    lines = [measure(name, width, backend) for name, backend in asked]
    rows = [line.cells() for line in lines]
    print(table(HEADS, rows))
    if width > 64:
        record = {"lines": [{**asdict(x), "rest": x.rest} for x in lines]}
        print(f"written to {write_results('training-bytes', record, HEADS, rows, NOTES)}")


if __name__ == "__main__":
    main()
