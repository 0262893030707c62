"""The CSR product as an operator of its own, for layers in training.

`gossamer::csr_linear(x, indptr, indices, values, bias, cols)` is what `gossamer::sparse_linear` computes for a CSR
weight. That one takes a list of parts, and torch's autograd keeps the arguments of such operators alive until the next
garbage collection: the activations of several steps. This one takes plain tensors, and costs less per call.

Shapes: T tokens (any leading axes), M output rows, K input columns, E kept entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.ops import LIBRARY, backward, forward, no_second_derivative, width_error

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "csr_linear(Tensor x, Tensor indptr, Tensor indices, Tensor values, Tensor? bias, int cols) -> Tensor", tags=_TAGS
)
LIBRARY.define(
    "csr_linear_backward(Tensor grad, Tensor x, Tensor indptr, Tensor indices, Tensor values, bool need_x, "
    "bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def csr_linear(x: Tensor, indptr: Tensor, indices: Tensor, values: Tensor, bias_M: Tensor | None, cols: int) -> Tensor:
    """y = x Wᵀ + b through the operator, differentiable in x, values and bias.

    Args:
        x: activations [..., K] in the dtype of the values.
        indptr: int32 [M + 1].
        indices: uint16 or int32 [E].
        values: [E].
        bias_M: [M], or None.
        cols: K.

    Raises:
        FormatError: the parts disagree, or x has another width than K.

    Example:
        >>> one = torch.tensor([0, 1], dtype=torch.int32)
        >>> csr_linear(torch.ones(1, 2), one, one[:1], torch.tensor([3.0]), None, 2).tolist()
        [[3.0]]
    """
    return torch.ops.gossamer.csr_linear(x, indptr, indices, values, bias_M, cols)


def _meta(indptr: Tensor, cols: int) -> str:
    return f'{{"format": "csr", "rows": {indptr.shape[0] - 1}, "cols": {cols}}}'


def _forward(x: Tensor, indptr: Tensor, indices: Tensor, values: Tensor, bias: Tensor | None, cols: int) -> Tensor:
    return forward(x, [indptr, indices, values], _meta(indptr, cols), bias, "none", "", None)


def _fake(x, indptr, indices, values, bias, cols):
    if not x.dim() or x.shape[-1] != cols:
        raise width_error(x, cols)
    return x.new_empty(*x.shape[:-1], indptr.shape[0] - 1)


def _backward(
    grad: Tensor,
    x: Tensor,
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    meta, needs = _meta(indptr, x.shape[-1]), (need_x, need_values, need_bias)
    return backward(grad, x, [indptr, indices, values], meta, None, "none", *needs)


def _fake_backward(grad, x, indptr, indices, values, need_x, need_values, need_bias):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        torch.empty_like(values) if need_values else x.new_empty(0),
        x.new_empty(indptr.shape[0] - 1) if need_bias else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, indptr, indices, values, _, _ = inputs
    ctx.save_for_backward(x, indptr, indices, values)


def _autograd(ctx, grad):
    need_x, _, _, need_values, need_bias, _ = ctx.needs_input_grad
    dx, dvalues, dbias = torch.ops.gossamer.csr_linear_backward(
        grad.contiguous(), *ctx.saved_tensors, need_x, need_values, need_bias
    )
    return dx if need_x else None, None, None, dvalues if need_values else None, dbias if need_bias else None, None


LIBRARY.impl("csr_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("csr_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gossamer::csr_linear", _fake, lib=LIBRARY)
torch.library.register_fake("gossamer::csr_linear_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("gossamer::csr_linear", _autograd, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("gossamer::csr_linear_backward", no_second_derivative, lib=LIBRARY)
