"""recover: a pruned model learns from the dense one and from text, its zeros staying zero."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..core.errors import BudgetError, CalibrationError
from ..core.schedule import Linear
from .distillation import Distillation, squarehead
from .patient import patient
from .recovering import Recovering

__all__ = ["Distillation", "RecoverReport", "paper_rate", "recover", "squarehead"]
Progress = Callable[[str, int, int], None]
HIDDEN_STATES = Distillation()
# Highest density that each rate is for, with batches of 32 and 20 steps of warm-up.
PAPER_RATES = ((0.2, 1e-4), (0.3, 8e-5), (0.4, 1e-4), (1.0, 3e-5))


@dataclass(frozen=True)
class RecoverReport:
    """What `recover` did.

    Args:
        steps: optimizer steps taken, those of earlier sessions among them.
        seconds: time taken, by the clock that was given, earlier sessions included.
        losses: at each step.
        resumed: steps that an earlier session had taken.
        bytes: memory of weights, masks, gradients, optimizer and teacher; activations come on top.
    """

    steps: int
    seconds: float
    losses: tuple[float, ...]
    resumed: int = 0
    bytes: int = 0


def paper_rate(density: float) -> float:
    """The learning rate that the paper found for a density, for models of billions of weights; small ones bear more.

    Example:
        >>> paper_rate(0.5), paper_rate(0.4)
        (3e-05, 0.0001)

    Reference: Kurtic et al., "Sparse fine-tuning for inference acceleration of LLMs", arXiv:2310.06927.
    """
    if not 0.0 < density <= 1.0:
        raise BudgetError(f"density is the fraction KEPT, above 0 and up to 1, got {density:g}")
    return next(rate for most, rate in PAPER_RATES if density <= most + 1e-9)


def recover(
    model: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    seconds: float | None = None,
    lr: float = 5e-4,
    warm_up: float = 0.1,
    loss: Distillation = HIDDEN_STATES,
    accumulate: int = 1,
    checkpoint: str | Path | None = None,
    save_every: float = 120.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> RecoverReport:
    """Train the kept weights of `model`, in place, to answer as `teacher` does, and by `loss` to predict as well.

    Embeddings stay frozen (they are what both models share), and so does an output head tied to them. Adam, linear
    warm-up, then linear decay to 0. Neither model drops out anything. On CPUs with bfloat16 products the passes run in
    bfloat16 and the weights stay in float32; a teacher given in bfloat16 is not converted anew in each step.

    Memory: of each trained weight 4 bytes, its gradient 4 and two moments 8, a mask byte for each held weight, the
    teacher, and the activations of one batch; `accumulate` makes larger steps from the same.

    Args:
        model: pruned; must return hidden states when called with output_hidden_states=True.
        teacher: the dense model; may be None where the loss asks none.
        batches: inputs as mappings; run again from the start when they end before `steps`.
        steps: optimizer steps; sets the schedule's length.
        seconds: stop early after this long (the schedule then follows the clock).
        lr: highest learning rate; see `paper_rate`.
        warm_up: share of the run spent warming up.
        loss: what is learnt; for language models the paper adds cross-entropy: `Distillation(cross_entropy=1.0)`.
        accumulate: batches whose mean gradient makes one step.
        checkpoint: a safetensors file. A run that was stopped (Ctrl-C, kill -9) goes on from it when it is called with
            the same pruned model, batches and settings, and ends with the same weights bit for bit where no `seconds`
            are given; these may change. It stays, so a finished run is read back.
        save_every: between checkpoints. Unit: seconds of the wall clock.
        clock: what `seconds` are counted by; `time.process_time` counts those of the processor.
        progress: called with (loss and time left in words, step, steps expected).

    Raises:
        CalibrationError: no batch was given.
        TargetError: the model has no zeros, the loss asks for what a model does not give, or the checkpoint is of
            another run.
        NonFiniteError: the loss is not finite any more; lower the rate.

    Example:
        >>> recover(model, dense, batches, steps=400, loss=Distillation(cross_entropy=1.0))  # doctest: +SKIP

    Reference: Kurtic et al., "Sparse fine-tuning for inference acceleration of LLMs", arXiv:2310.06927.
    Departs from: embeddings and tied heads are frozen, Adam's second moment forgets faster (0.95), warm-up is a share
    of the run where the official code takes 20 steps, and the default loss has no cross-entropy, for encoders.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("recover got no batches; pass inputs such as encode_batches(tokenizer, texts)")
    if steps < 1 or accumulate < 1 or (seconds is not None and seconds <= 0):
        raise BudgetError(f"steps, accumulate and seconds are above 0, got {steps}, {accumulate}, {seconds}")
    plan = {"steps": steps, "warm_up": warm_up}
    run = Recovering(model, teacher, batches, loss, lr=lr, accumulate=accumulate, plan=plan)
    file = Path(checkpoint) if checkpoint is not None else None
    models = [m for m in (model, teacher) if m is not None]
    try:
        if file is not None and file.exists():
            run.load(file)
        resumed, pace = len(run.losses), _Pace(run, steps, seconds, warm_up, clock)
        with _evaluating(*models), _lean(*models), patient() as stopped:
            _loop(run, pace, file, save_every, stopped, progress)
        return RecoverReport(len(run.losses), pace.elapsed, tuple(run.losses), resumed, run.bytes)
    finally:
        run.close()


class _Pace:
    """How far a run is, by steps or by the clock, and the share of the learning rate that belongs there."""

    def __init__(
        self, run: Recovering, steps: int, seconds: float | None, warm_up: float, clock: Callable[[], float]
    ) -> None:
        self.run, self.steps, self.seconds, self.warm_up, self.clock = run, steps, seconds, warm_up, clock
        self.began = clock() - run.elapsed

    @property
    def elapsed(self) -> float:
        return self.clock() - self.began

    @property
    def done(self) -> float:
        return max(len(self.run.losses) / self.steps, self.elapsed / self.seconds if self.seconds else 0.0)

    def scale(self, done: float) -> float:
        rise, fall = Linear(0.0, 1.0, steps=100), Linear(1.0, 0.0, steps=100)
        if done < self.warm_up:
            return max(rise(int(100 * done / self.warm_up)), 0.01)
        return max(fall(int(100 * (done - self.warm_up) / (1 - self.warm_up))), 0.01)

    def tell(self, progress: Progress) -> None:
        share, step = min(self.done, 1.0), len(self.run.losses)
        left = self.elapsed * (1 - share) / share
        progress(f"loss {self.run.losses[-1]:.3f}  {_time(left)} left", step, math.ceil(step / share))


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _loop(
    run: Recovering,
    pace: _Pace,
    file: Path | None,
    save_every: float,
    stopped: Callable[[], bool],
    progress: Progress | None,
) -> None:
    saved = time.monotonic()
    while (done := pace.done) < 1.0:
        run.advance(pace.scale(done))
        if progress is not None:
            pace.tell(progress)
        over = stopped() or pace.done >= 1.0
        if file is not None and (over or time.monotonic() - saved >= save_every):
            run.save(file, pace.elapsed)
            saved = time.monotonic()
        if stopped():
            raise KeyboardInterrupt


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """No dropout in either model; afterwards every module is in the mode it came in."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def _lean(*models: nn.Module) -> Iterator[None]:
    """transformers' plain attention while training: torch's fused one is many times slower backward on CPUs.

    And no key-value cache, which only generation has a use for.
    """
    switchable = [m for m in models if hasattr(m, "set_attn_implementation")]
    before = [(m.config._attn_implementation, getattr(m.config, "use_cache", None)) for m in switchable]
    try:
        for m in switchable:
            m.set_attn_implementation("eager")
            if hasattr(m.config, "use_cache"):
                m.config.use_cache = False
        yield
    finally:
        for m, (name, cache) in zip(switchable, before):
            m.set_attn_implementation(name)
            if cache is not None:
                m.config.use_cache = cache
