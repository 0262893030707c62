"""What a training run is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ..core.errors import GossamerError

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Plan:
    """One training run.

    Args:
        task: name of a built-in task.
        method: a registered training method, or "dense".
        density: fraction kept, in (0, 1]; None = the method's own.
        allocation: as in `attach`.
        backend: "masked" or "sparse", as in `attach`.
        targets, skip: glob patterns of layers.
        options: the method's own.
        steps: optimizer steps; sets the schedules' length.
        batch: samples a step.
        rate: highest learning rate; it falls to 0 along a cosine.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        decay: weight decay.
        seed: of the network and of the order of samples.
        start: folder of an earlier run to start from; "" = a new network.
        tried: settings that were tried before this one was chosen, itself included: for fair comparisons.
        save_every: steps between checkpoints.
        device: where torch trains, such as "cuda"; figures are taken on the processor.
    """

    task: str
    steps: int
    batch: int
    rate: float
    method: str = "dense"
    density: float | None = None
    allocation: str | Mapping[str, float] | None = None
    backend: str = "masked"
    targets: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    optimizer: str = "adamw"
    decay: float = 0.0
    seed: int = 0
    start: str = ""
    tried: int = 1
    save_every: int = 100
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "tried", "save_every"):
            if getattr(self, name) < 1:
                raise GossamerError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rate <= 0 or self.decay < 0:
            raise GossamerError(f"rate must be above 0 and decay not below, got rate={self.rate}, decay={self.decay}")
        if self.optimizer not in OPTIMIZERS:
            raise GossamerError(f"optimizer is one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        of_methods = {"density": self.density not in (None, 1.0), "backend": self.backend != "masked"}
        of_methods |= {n: bool(getattr(self, n)) for n in ("allocation", "targets", "skip", "options")}
        if self.method == "dense" and any(of_methods.values()):
            given = ", ".join(name for name, said in of_methods.items() if said)
            raise GossamerError(f"method 'dense' keeps every weight; leave {given} out, or name a method")

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {**asdict(self), "targets": list(self.targets), "skip": list(self.skip)}
