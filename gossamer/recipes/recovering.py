"""A recovery in memory: what has a state, what a step does, and how both are written and read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..attach.targets import slots
from ..attach.weights import hold
from ..core.errors import FileDamaged, NonFiniteError, TargetError
from ..core.files import whole_file
from .distillation import Distillation

Batches = Sequence[Mapping[str, Tensor]]
RECORD = "recovery"


class Recovering:
    """A pruned model, its masks and its optimizer, step by step.

    Args:
        accumulate: batches whose gradients make one step.
        plan: what makes two runs the same, beside masks and batches.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        batches: Batches,
        loss: Distillation,
        *,
        lr: float,
        accumulate: int,
        plan: Mapping[str, object],
    ) -> None:
        self.model, self.teacher, self.batches, self.loss, self.lr = model, teacher, batches, loss, lr
        self.accumulate = accumulate
        self.before = [(p, p.requires_grad) for p in model.parameters()]
        self.handle = hold(model)
        self.device = next(model.parameters()).device.type
        self.optimizer = torch.optim.Adam(_trainable(model), lr=lr, betas=(0.9, 0.95), fused=True)
        self.handle.optimizer = self.optimizer
        self.losses: list[float] = []
        self.elapsed = 0.0  # before this session
        self.plan = {**plan, "loss": vars(loss), "lr": lr, "accumulate": accumulate}

    def advance(self, scale: float) -> None:
        """One optimizer step at `scale` of the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.lr * scale
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in self._next():
            with torch.autocast(self.device, torch.bfloat16, enabled=_fast_bfloat16(self.device)):
                loss = self.loss(self.model, self.teacher, batch) / self.accumulate
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise NonFiniteError(f"the loss is {total} after step {len(self.losses)}; lower lr= (it is {self.lr:g})")
        self.optimizer.step()
        self.handle.step()
        self.losses.append(total)

    def _next(self) -> Iterator[Mapping[str, Tensor]]:
        first = len(self.losses) * self.accumulate
        return (self.batches[i % len(self.batches)] for i in range(first, first + self.accumulate))

    @property
    def bytes(self) -> int:
        """Memory of weights, masks, gradients, both moments and the teacher; activations come on top."""
        trained = sum(p.numel() * p.element_size() for p in self.optimizer.param_groups[0]["params"])
        held = {x.data_ptr(): x.nbytes for m in (self.model, self.teacher) if m for x in m.state_dict().values()}
        return sum(held.values()) + 3 * trained

    def close(self) -> None:
        """Masks and gradients go, zeros stay, and what was frozen before is as frozen after."""
        self.handle.remove()
        for p, trainable in self.before:
            p.requires_grad_(trainable)
            p.grad = None

    def save(self, file: Path, elapsed: float) -> None:
        """All that the rest of the run depends on, in one file that is there whole or not at all."""
        record = {**self._identity(), "losses": self.losses, "elapsed": elapsed}
        with whole_file(file) as draft:
            save_file(dict(self._tensors()), draft, metadata={RECORD: json.dumps(record)})

    def load(self, file: Path) -> None:
        """Go on from `save()`.

        Raises:
            TargetError: it is of a run with other batches, masks or settings.
            FileDamaged: it cannot be read.
        """
        try:
            with safe_open(file, "pt") as held:
                record = json.loads(held.metadata()[RECORD])
                self._refuse_other(file, record)
                self._restore({name: held.get_tensor(name) for name in held.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise FileDamaged(f"{file} cannot be read ({error}); delete it to start this recovery anew") from error
        self.losses, self.elapsed = list(record["losses"]), float(record["elapsed"])

    def _identity(self) -> dict[str, object]:
        return json.loads(json.dumps({"plan": self.plan, "masks": self._masks(), "batches": _digest(self.batches)}))

    def _masks(self) -> str:
        total = hashlib.sha256()
        for name, support in self.handle.supports().items():
            total.update(name.encode() + support.kept.cpu().numpy().tobytes())
        return total.hexdigest()

    def _refuse_other(self, file: Path, record: Mapping[str, object]) -> None:
        for key, ours in self._identity().items():
            if record[key] != ours:
                raise TargetError(
                    f"{file} holds a recovery with {key} = {record[key]}, now it is {ours}; delete that file, or "
                    "choose another"
                )

    def _named(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self._named().items():
            yield name, p.detach().contiguous()
            for i, slot in enumerate(slots(self.optimizer, p)):
                yield f"{name}#{i}", slot.contiguous()
        yield "#steps", torch.tensor(len(self.losses))

    def _restore(self, held: Mapping[str, Tensor]) -> None:
        step = held["#steps"].float()
        for name, p in self._named().items():
            with torch.no_grad():
                p.copy_(held[name])
            if f"{name}#0" in held:
                moments = (held[f"{name}#{i}"].to(p.device) for i in range(2))
                self.optimizer.state[p] = dict(zip(("step", "exp_avg", "exp_avg_sq"), (step.clone(), *moments)))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    frozen = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and id(p) not in frozen)
    return [p for p in model.parameters() if p.requires_grad]


def _digest(batches: Batches) -> str:
    total = hashlib.sha256()
    for batch in batches:
        for name, part in sorted(batch.items()):
            total.update(name.encode() + (part.cpu().numpy().tobytes() if isinstance(part, Tensor) else b""))
    return total.hexdigest()


def _fast_bfloat16(device: str) -> bool:
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported()
