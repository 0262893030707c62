"""The stored product as torch.library operators, so that compile, export and autograd see one op.

`gossamer::sparse_linear(x, parts, meta, bias, activation, backend, tokens)` is
y = act(x Wᵀ + b), with W given by a format's parts (in the format's own order) and its record as JSON. Plans are
kept per values tensor and renewed when it changes, unless the kernel reads the values where they are. Gradients of
CSR and row-grouped float32 weights on the CPU cost what is kept (`kernels.training`); others go through the dense W.

Shapes: T tokens (any leading axes), M output rows, K input columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.core.errors import FormatError
from gossamer.formats import Format, format_from, format_named
from gossamer.kernels.dispatch import Plan, resolve
from gossamer.kernels.reference import activation_gradient
from gossamer.kernels.training import gradients, serves, wiring_of

LIBRARY = torch.library.Library("gossamer", "DEF")
LIBRARY.define(
    "sparse_linear(Tensor x, Tensor[] parts, str meta, Tensor? bias, str activation, str backend, "
    "int? tokens) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "sparse_linear_backward(Tensor grad, Tensor x, Tensor[] parts, str meta, Tensor? bias, str activation, "
    "bool need_x, bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def sparse_linear(
    x: Tensor,
    fmt: Format,
    bias_M: Tensor | None = None,
    *,
    activation: str = "none",
    backend: str | None = None,
    tokens: int | None = None,
) -> Tensor:
    """y = act(x Wᵀ + b) through the operator: differentiable, and one node to compilers.

    Args:
        x: activations [..., K] in the weight's dtype.
        fmt: the stored weight [M, K]; its values receive a gradient when they require one.
        bias_M: added before the activation.
        activation: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".
        backend: insist on one by name; None takes the first that serves.
        tokens: rows of x expected per call, where known.

    Raises:
        FormatError: the parts disagree, or x has another width than K.
        DispatchError: the named backend cannot serve; the message says why.

    Example:
        >>> from gossamer.formats import CSR
        >>> sparse_linear(torch.ones(1, 2), CSR.from_dense(torch.eye(2))).tolist()
        [[1.0, 1.0]]
    """
    parts = list(fmt.parts().values())
    return torch.ops.gossamer.sparse_linear(x, parts, record(fmt), bias_M, activation, backend or "", tokens)


def record(fmt: Format) -> str:
    """A format's record as the operators take it: `meta()` in JSON."""
    # Written by hand, because compilers cannot trace json's encoder.
    options = "".join(f', "{name}": {getattr(fmt, name)}' for name in fmt.OPTIONS)
    return f'{{"format": "{fmt.name}"{options}}}'


@lru_cache(maxsize=4096)
def _meta(meta: str) -> dict[str, Any]:
    return json.loads(meta)


def _named(parts: Sequence[Tensor], meta: str) -> dict[str, Tensor]:
    names = format_named(str(_meta(meta).get("format"))).PARTS
    if len(parts) != len(names):
        raise FormatError(f"{_meta(meta)['format']} has the parts {', '.join(names)}; got {len(parts)} tensors")
    return dict(zip(names, parts))


def width_error(x: Tensor, cols: int) -> FormatError:
    """The error for activations whose last axis is not K."""
    got = x.shape[-1] if x.dim() else "a scalar"
    return FormatError(f"the layer takes {cols} input features, got {got} (x has shape {tuple(x.shape)})")


@dataclass(frozen=True)
class _Kept:
    """A plan, and what its parts and their values were when it was made."""

    state: tuple
    values: tuple[int, int]
    plan: Plan

    def serves(self, state: tuple, values: tuple[int, int]) -> bool:
        """Whether the plan still holds; a step of training changes values in place, which some kernels may ignore."""
        in_place = getattr(self.plan.runner, "READS_IN_PLACE", False) and self.values[0] == values[0]
        return self.state == state and (in_place or self.values == values)


_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _seen(part: Tensor) -> tuple[int, int]:
    """Changes whenever a part is swapped, moved or written to."""
    return part.data_ptr(), 0 if part.is_inference() else part._version


def plan_for(parts: Sequence[Tensor], meta: str, *, backend: str, tokens: int | None, trusted: bool = False) -> Plan:
    """The plan kept for these parts, made afresh when they changed. Trusted parts are not checked again."""
    named = _named(parts, meta)
    values = _seen(named["values"])
    state = (meta, backend, tokens, *(_seen(part) for name, part in named.items() if name != "values"))
    found = _PLANS.get(named["values"])
    if found is None or not found.serves(state, values):
        # Aliases, so that the kept plan does not keep its own key alive.
        aliases = {name: part.detach() for name, part in named.items()}
        fmt = _unchecked(aliases, meta) if trusted else format_from(_meta(meta), aliases)
        found = _Kept(state, values, resolve(fmt, tokens=tokens, backend=backend or None))
        _PLANS[named["values"]] = found
    return found.plan


def forget_plan(values: Tensor) -> None:
    """Drop the plan kept for a values part."""
    _PLANS.pop(values, None)


def _unchecked(parts: dict[str, Tensor], meta: str) -> Format:
    options = {key: value for key, value in _meta(meta).items() if key != "format"}
    return format_named(_meta(meta)["format"])(**options, **parts)


def forward(
    x: Tensor, parts: list[Tensor], meta: str, bias: Tensor | None, activation: str, backend: str, tokens: int | None
) -> Tensor:
    plan = plan_for(parts, meta, backend=backend, tokens=tokens)
    check_input(x, plan.call.fmt.cols, plan.call)
    return run_over(plan, x, bias, activation)


def run_over(plan: Plan, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Run a plan over any leading axes."""
    if x.dim() == 2 and x.is_contiguous():
        return plan.run(x, bias, activation)
    rows, cols = plan.call.fmt.shape
    lead = x.shape[:-1]
    return plan.run(x.reshape(lead.numel(), cols).contiguous(), bias, activation).view(*lead, rows)


def check_input(x: Tensor, cols: int, like) -> None:
    """Refuse activations of another width, dtype or device than the weight's.

    Raises:
        FormatError: another width, or another dtype or device (convert one with `.to(...)`).
    """
    if not x.dim() or x.shape[-1] != cols:
        raise width_error(x, cols)
    if x.layout is not torch.strided:
        raise FormatError(f"the layer takes ordinary tensors, x has the layout {x.layout}; call .to_dense()")
    if x.dtype != like.dtype or x.device != like.device:
        raise FormatError(
            f"the layer's weights are {like.dtype} on {like.device}, x is {x.dtype} on {x.device}; "
            "convert one with .to(...)"
        )


def _fake(x, parts, meta, bias, activation, backend, tokens):
    rows, cols = _meta(meta)["rows"], _meta(meta)["cols"]
    if not x.dim() or x.shape[-1] != cols:
        raise width_error(x, cols)
    return x.new_empty(*x.shape[:-1], rows)


def backward(
    grad: Tensor,
    x: Tensor,
    parts: list[Tensor],
    meta: str,
    bias: Tensor | None,
    activation: str,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    named = _named(parts, meta)
    fmt = _unchecked({name: part.detach() for name, part in named.items()}, meta)
    tokens = x.shape[:-1].numel()
    x_TK, grad_TM = x.reshape(tokens, fmt.cols), grad.reshape(tokens, fmt.rows)
    with torch.autocast(x.device.type, enabled=False):
        if serves(fmt):
            wiring = wiring_of(fmt, named["indices"])
            dz_TM = _before(grad_TM, activation, lambda: wiring.product(x_TK, fmt.values, bias))
            dx, dvalues = gradients(wiring, fmt.values, dz_TM, x_TK, need_x=need_x, need_values=need_values)
        else:
            w_MK = fmt.to_dense()
            dz_TM = _before(grad_TM, activation, lambda: linear(x_TK, w_MK, bias))
            dx = dz_TM @ w_MK if need_x else None
            dvalues = fmt.gather(dz_TM.t() @ x_TK).contiguous() if need_values else None
        return (
            x.new_empty(0) if dx is None else dx.view(x.shape),
            x.new_empty(0) if dvalues is None else dvalues,
            dz_TM.sum(0) if need_bias else x.new_empty(0),
        )


def _before(grad_TM: Tensor, activation: str, product: Callable[[], Tensor]) -> Tensor:
    """The gradient before the activation; its input is computed again rather than kept."""
    return grad_TM if activation == "none" else activation_gradient(grad_TM, product(), activation)


def _fake_backward(grad, x, parts, meta, bias, activation, need_x, need_values, need_bias):
    values = _named(parts, meta)["values"]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        torch.empty_like(values) if need_values else x.new_empty(0),
        x.new_empty(_meta(meta)["rows"]) if need_bias else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, parts, meta, bias, activation, *_ = inputs
    ctx.save_for_backward(x, bias, *parts)
    ctx.meta, ctx.activation = meta, activation
    ctx.values_at = list(_named(parts, meta)).index("values")


def _autograd(ctx, grad):
    x, bias, *parts = ctx.saved_tensors
    need_x, need_parts, _, need_bias, *_ = ctx.needs_input_grad
    need_values = need_parts[ctx.values_at] if isinstance(need_parts, (list, tuple)) else bool(need_parts)
    dx, dvalues, dbias = torch.ops.gossamer.sparse_linear_backward(
        grad.contiguous(), x, parts, ctx.meta, bias, ctx.activation, need_x, need_values, need_bias
    )
    dparts = [dvalues if at == ctx.values_at and need_values else None for at in range(len(parts))]
    return dx if need_x else None, dparts, None, dbias if need_bias else None, None, None, None


def no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "sparse products have first derivatives only; for second ones differentiate the dense layer (unpack, to_dense)"
    )


LIBRARY.impl("sparse_linear", forward, "CompositeExplicitAutograd")
LIBRARY.impl("sparse_linear_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::sparse_linear", _fake, lib=LIBRARY)
torch.library.register_fake("gossamer::sparse_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("gossamer::sparse_linear", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("gossamer::sparse_linear_backward", no_second_derivative, lib=LIBRARY)
