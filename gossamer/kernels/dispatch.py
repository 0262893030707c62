"""Which kernel runs a stored weight: decided once, at packing, with every refusal kept and sayable.

A kernel declares the formats, devices and backend it serves and a `refuse(call)` that answers None or a reason.
`resolve` asks them all, prepares the first that serves, and returns a frozen `Plan`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from gossamer.core.errors import DispatchError, unknown
from gossamer.formats import Format

# Tried in this order when no backend is named.
BACKENDS = ("cpu", "onednn", "dense", "unpack", "triton", "reference")

log = logging.getLogger("gossamer")


@dataclass(frozen=True)
class Call:
    """What a product is asked for: a stored weight, and where and in what its activations come."""

    fmt: Format
    device: torch.device
    dtype: torch.dtype
    tokens: int | None

    def __str__(self) -> str:
        rows, cols = self.fmt.shape
        dtype = str(self.dtype).removeprefix("torch.")
        tokens = "any number of" if self.tokens is None else self.tokens
        density = "unknown" if self.fmt.values.is_meta else f"{self.fmt.density:.3g}"
        return f"{self.fmt.name} {rows}x{cols} at density {density}, {tokens} tokens, {dtype} on {self.device}"


class Runner(Protocol):
    """A prepared kernel: holds what it laid out at packing, and runs."""

    @staticmethod
    def refuse(call: Call) -> str | None:
        """Why this call cannot be served, in words; None when it can."""

    @classmethod
    def prepare(cls, call: Call) -> Self:
        """Lay the weight out once."""

    def run(self, x_TK: Tensor, bias_M: Tensor | None, activation: str) -> Tensor:
        """act(x Wᵀ + b) for contiguous x [T, K]."""

    def laid_out(self) -> tuple[Tensor, ...]:
        """The tensors that preparing made, for counting their bytes."""


@dataclass(frozen=True)
class Kernel:
    """A registered kernel: what it declares, and the runner class behind it."""

    operation: str
    name: str
    backend: str
    formats: tuple[type[Format], ...]
    devices: tuple[str, ...] | None
    runner: type[Runner]

    @property
    def label(self) -> str:
        return f"{self.backend}/{self.name}"

    def refuse(self, call: Call) -> str | None:
        """Why this kernel cannot serve, from what it declares first and its own check after; None when it can."""
        if not isinstance(call.fmt, self.formats):
            return f"serves {', '.join(cls.__name__ for cls in self.formats)}; the weight is {call.fmt.name}"
        if self.devices is not None and call.device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}; the activations are on {call.device}"
        if call.dtype != call.fmt.dtype:
            return f"weights are {call.fmt.dtype}, activations {call.dtype}; convert one of them"
        return self.runner.refuse(call)


@dataclass(frozen=True)
class Refusal:
    """A kernel that cannot serve, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """A kernel chosen and prepared for one stored weight.

    Args:
        kernel: "backend/name" of the kernel that runs.
        backend: its backend.
        call: what was asked for.
        runner: the prepared kernel.
        named: whether the backend was asked for by name.
        refusals: kernels that cannot serve, with reasons.
        others: kernels that could serve but rank lower.
    """

    kernel: str
    backend: str
    call: Call
    runner: Runner
    named: bool
    refusals: tuple[Refusal, ...]
    others: tuple[str, ...]

    def run(self, x_TK: Tensor, bias_M: Tensor | None = None, activation: str = "none") -> Tensor:
        """y = act(x Wᵀ + b), x contiguous [T, K], any T; in the weight's dtype even inside autocast."""
        if torch.is_autocast_enabled(x_TK.device.type):
            with torch.autocast(x_TK.device.type, enabled=False):
                return self.runner.run(x_TK, bias_M, activation)
        return self.runner.run(x_TK, bias_M, activation)

    @property
    def extra_nbytes(self) -> int:
        """Bytes that preparing added to the format's own: block pointers, widened indices, a re-ordered copy."""
        ours = {part.untyped_storage().data_ptr() for part in self.call.fmt.parts().values()}
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in self.runner.laid_out()
            if tensor.is_mkldnn or tensor.untyped_storage().data_ptr() not in ours
        )


KERNELS: list[Kernel] = []
R = TypeVar("R")


def kernel(
    operation: str,
    *formats: type[Format],
    name: str,
    backend: str,
    devices: tuple[str, ...] | None = None,
) -> Callable[[type[R]], type[R]]:
    """Register a runner class: `@kernel("linear", CSR, NM, name="spmm", backend="cpu", devices=("cpu",))`.

    Args:
        operation: what it computes; "linear" is act(x Wᵀ + b).
        formats: format classes it reads.
        name: short name, unique within its backend.
        backend: one of `BACKENDS`.
        devices: device types it runs on; None for any.

    Raises:
        DispatchError: that backend already has a kernel of this name; choose another.
        UnknownName: no such backend.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)

    def register(runner: type[R]) -> type[R]:
        record = Kernel(operation, name, backend, formats, devices, runner)  # type: ignore[arg-type]
        if any(known.label == record.label for known in KERNELS):
            raise DispatchError(f"kernel {record.label} is registered twice; choose another name")
        KERNELS.append(record)
        KERNELS.sort(key=lambda known: BACKENDS.index(known.backend))
        return runner

    return register


def resolve(
    fmt: Format,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    backend: str | None = None,
    operation: str = "linear",
) -> Plan:
    """Choose and prepare the kernel that runs a stored weight, once.

    Args:
        fmt: the stored weight.
        device: where activations come; the weight's device when None.
        dtype: the activations' dtype; the weight's when None.
        tokens: rows of x expected per call; None for any number.
        backend: name one of `BACKENDS` to insist; None takes the first that serves, and logs every refusal.
        operation: what to compute.

    Raises:
        UnknownName: no backend has that name.
        DispatchError: the named backend, or every backend, refuses; the message lists the reasons.

    Example:
        >>> import torch
        >>> from gossamer.formats import Dense
        >>> resolve(Dense.from_dense(torch.eye(4)), backend="dense").kernel
        'dense/linear'
    """
    if backend is not None and backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    call = Call(fmt, torch.device(device or fmt.device), dtype or fmt.dtype, tokens)
    able, refusals = _ask(call, operation, backend)
    _tell(call, refusals, backend)
    if not able:
        raise DispatchError(_cannot(call, refusals, backend))
    chosen, *others = able
    runner = chosen.runner.prepare(call)
    labels = tuple(known.label for known in others)
    return Plan(chosen.label, chosen.backend, call, runner, backend is not None, refusals, labels)


def _ask(call: Call, operation: str, backend: str | None) -> tuple[list[Kernel], tuple[Refusal, ...]]:
    asked = [known for known in KERNELS if known.operation == operation and backend in (None, known.backend)]
    answers = [(known, known.refuse(call)) for known in asked]
    refusals = tuple(Refusal(known.label, reason) for known, reason in answers if reason is not None)
    return [known for known, reason in answers if reason is None], refusals


def _tell(call: Call, refusals: tuple[Refusal, ...], backend: str | None) -> None:
    if backend is None:
        for refusal in refusals:
            log.info("%s refused %s: %s", refusal.kernel, call, refusal.reason)


def _cannot(call: Call, refusals: tuple[Refusal, ...], backend: str | None) -> str:
    asked = "no backend" if backend is None else f"backend {backend!r}"
    reasons = "\n".join(f"  {refusal.kernel}: {refusal.reason}" for refusal in refusals)
    fix = "" if backend is None else "\nleave backend=None to let the first able kernel run"
    return f"{asked} {'can' if backend is None else 'cannot'} run {call}:\n{reasons}{fix}"


def explain(plan: Plan) -> str:
    """Say in words what runs and why: the kernel, its extra bytes, and every refusal with its reason."""
    how = "asked for by name" if plan.named else "the first that serves"
    note = getattr(plan.runner, "NOTE", "")
    lines = [str(plan.call), f"  runs     {plan.kernel} ({how}), {plan.extra_nbytes} bytes beside the format's"]
    lines += [f"  note     {note}"] if note else []
    lines += [f"  could    {label}" for label in plan.others]
    lines += [f"  refused  {refusal.kernel}: {refusal.reason}" for refusal in plan.refusals]
    return "\n".join(lines)
