"""recover: a short distillation from the dense model to its pruned copy, on unlabelled inputs, zeros staying zero.

Shape suffixes: B texts, T tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attach.weights import Handle, hold
from ..core.errors import CalibrationError
from ..core.schedule import Linear

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RecoverReport:
    """What `recover` did.

    Args:
        steps: optimizer steps taken.
        seconds: wall-clock time.
        losses: SquareHead loss at each step.
    """

    steps: int
    seconds: float
    losses: tuple[float, ...]


def squarehead(student: Sequence[Tensor], teacher: Sequence[Tensor], mask_BT: Tensor | None = None) -> Tensor:
    """Σ_l ‖s_l − t_l‖² / ‖t_l‖² over real tokens: every layer counts the same whatever its scale.

    Args:
        student, teacher: hidden states per layer, [B, T, D].
        mask_BT: True for real tokens; None = all.

    Reference: Kurtic et al., "Sparse fine-tuning for inference acceleration of LLMs", arXiv:2310.06927.
    """
    total = torch.zeros((), device=student[0].device)
    for s, t in zip(student, teacher, strict=True):
        if mask_BT is not None:
            s, t = s[mask_BT], t[mask_BT]
        total = total + (s.float() - t.float()).square().sum() / t.float().square().sum().clamp(min=1e-12)
    return total


def recover(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    seconds: float | None = None,
    lr: float = 5e-4,
    warm_up: float = 0.1,
    progress: Progress | None = None,
) -> RecoverReport:
    """Train the kept weights of `model` to give the hidden states of `teacher`, in place.

    Embeddings stay frozen (they are what both models share). Adam, linear warm-up, then linear decay to 0. On CPUs
    with bfloat16 products the passes run in bfloat16 and the weights stay in float32.

    Args:
        model: pruned; must return hidden states when called with output_hidden_states=True.
        teacher: the dense model.
        batches: inputs as mappings; run again from the start when they end before `steps`.
        steps: optimizer steps; sets the schedule's length.
        seconds: stop early after this long (the schedule then follows the clock).
        lr: highest learning rate.
        warm_up: share of the run spent warming up.

    Raises:
        CalibrationError: no batch was given.
        TargetError: the model has no zeros.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("recover got no batches; pass inputs such as encode_batches(tokenizer, texts)")
    began, losses = time.perf_counter(), []
    handle = hold(model)
    before = [(p, p.requires_grad) for p in model.parameters()]
    optimizer = torch.optim.Adam(_trainable(model), lr=lr, betas=(0.9, 0.95), fused=True)
    handle.optimizer = optimizer
    rise, fall = Linear(0.0, 1.0, steps=100), Linear(1.0, 0.0, steps=100)
    with _evaluating(model, teacher), _plain_attention(model, teacher), _released(handle, before):
        for step in range(steps):
            done = max(step / steps, (time.perf_counter() - began) / seconds if seconds else 0.0)
            if done >= 1.0:
                break
            scale = (
                rise(int(100 * done / warm_up)) if done < warm_up else fall(int(100 * (done - warm_up) / (1 - warm_up)))
            )
            optimizer.param_groups[0]["lr"] = lr * max(scale, 0.01)
            losses.append(_step(model, teacher, batches[step % len(batches)], optimizer))
            handle.step()
            if progress is not None:
                progress("recover", step + 1, steps)
    return RecoverReport(len(losses), time.perf_counter() - began, tuple(losses))


@contextmanager
def _released(handle: Handle, before: Sequence[tuple[nn.Parameter, bool]]) -> Iterator[None]:
    """Whatever happens, the masks go, and what was frozen before is as frozen after."""
    try:
        yield
    finally:
        handle.remove()
        for p, trainable in before:
            p.requires_grad_(trainable)
            p.grad = None


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
def _plain_attention(*models: nn.Module) -> Iterator[None]:
    """transformers' plain attention while training: torch's fused one is many times slower backward on CPUs."""
    switchable = [m for m in models if hasattr(m, "set_attn_implementation")]
    before = [m.config._attn_implementation for m in switchable]
    try:
        for m in switchable:
            m.set_attn_implementation("eager")
        yield
    finally:
        for m, name in zip(switchable, before):
            m.set_attn_implementation(name)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    frozen = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and id(p) not in frozen)
    return [p for p in model.parameters() if p.requires_grad]


def _step(model: nn.Module, teacher: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> float:
    device = next(model.parameters()).device.type
    mask = batch.get("attention_mask")
    with torch.autocast(device, torch.bfloat16, enabled=_fast_bfloat16(device)):
        with torch.no_grad():
            want = teacher(**batch, output_hidden_states=True).hidden_states
        got = model(**batch, output_hidden_states=True).hidden_states
    loss = squarehead(got[1:], want[1:], None if mask is None else mask.bool())  # [0] is the shared embedding
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def _fast_bfloat16(device: str) -> bool:
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported()
