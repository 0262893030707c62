"""Two ways: a layer whose gradient by its inputs is taken by another weight than its forward pass.

No parametrization can say this, for the layer's own product computes both; so the layer's `forward` is replaced.
Shape suffixes: B positions, I inputs, O outputs; N images, C channels.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import TargetError
from ..core.shrink import hard
from ..core.support import Support
from .targets import Target, sharers

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def open_back(module: nn.Module) -> None:
    """From now on ∂L/∂x = ∂L/∂y · back(w); y and ∂L/∂w are as before. The layer holds a two-way `Masked`."""
    module.forward = MethodType(_conv if isinstance(module, _CONVS) else _linear, module)


def close_back(module: nn.Module) -> None:
    """The layer's own forward again."""
    module.__dict__.pop("forward", None)


def refuse_one_way(model: nn.Module, target: Target) -> None:
    """Raise where a layer's forward cannot be replaced.

    Raises:
        TargetError: the layer is of a class of its own, whose forward we do not know, or is not called at all
            (the output projection of nn.MultiheadAttention); or its forward is replaced already, as by a hook of
            Accelerate's.
    """
    module = target.module(model)
    if type(module) not in (nn.Linear, *_CONVS) and not target.transposed:
        raise TargetError(
            f"layer {target.name!r} is a {type(module).__name__}, whose backward pass cannot be changed; skip= it"
        )
    if any("forward" in layer.__dict__ for layer, _ in sharers(model, target)):
        raise TargetError(
            f"the forward of layer {target.name!r} is replaced already (other libraries do that to call hooks), and "
            "cannot be replaced again; take that away first, or skip= the layer"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BI: Tensor, w_OI: Tensor, bias_O: Tensor | None, dense_OI: Tensor, back_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_BI, dense_OI, back_OI)
        return functional.linear(x_BI, w_OI, bias_O)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g_BO,) = grad_outputs
        x_BI, dense_OI, back_OI = ctx.saved_tensors
        by_x, by_w, by_bias = ctx.needs_input_grad[:3]
        flat_BO = g_BO.reshape(-1, g_BO.shape[-1])
        return (
            g_BO @ _view(dense_OI, back_OI, g_BO) if by_x else None,
            flat_BO.t() @ x_BI.reshape(-1, x_BI.shape[-1]) if by_w else None,
            flat_BO.sum(0) if by_bias else None,
            None,
            None,
        )


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, bias_O: Tensor | None, dense: Tensor, back: Tensor, *geometry) -> Tensor:
        stride, padding, dilation, groups = geometry
        ctx.save_for_backward(x, dense, back)
        ctx.geometry = geometry
        zeros = [0] * len(stride)
        return torch.ops.aten.convolution(x, w, bias_O, stride, padding, dilation, False, zeros, groups)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, dense, back = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = list(ctx.needs_input_grad[:3])
        w, zeros = _view(dense, back, g), [0] * len(stride)
        # One call serves: of the weight it reads the values for ∂L/∂x, and only the shape for ∂L/∂w.
        by = torch.ops.aten.convolution_backward(
            g, x, w, [w.shape[0]], stride, padding, dilation, False, zeros, groups, wanted
        )
        return *by, None, None, None, None, None, None


def _view(dense: Tensor, back: Tensor, like: Tensor) -> Tensor:
    """Made when it is needed, so that no second weight lives from the forward to the backward pass."""
    return hard(dense, Support(back)).to(like.dtype)


def _linear(self: nn.Module, x_BI: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return type(self).forward(self, x_BI)
    w, dense, back = _weights(self)
    if not isinstance(self, nn.Linear):  # transformers' Conv1D stores [I, O]
        w, dense, back = w.t(), dense.t(), back.t()
    return _Linear.apply(*_cast(x_BI, w, self.bias), dense, back)


def _conv(self: nn.Module, x_NC: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return type(self).forward(self, x_NC)
    padding, mode = self.padding, self.padding_mode
    if mode != "zeros" or isinstance(padding, str):
        x_NC = functional.pad(x_NC, self._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)
        padding = [0] * len(self.stride)
    geometry = list(self.stride), list(padding), list(self.dilation), self.groups
    alone = x_NC.dim() == len(self.stride) + 1  # one image without a batch axis
    w, dense, back = _weights(self)
    y = _Conv.apply(*_cast(x_NC[None] if alone else x_NC, w, self.bias), dense, back, *geometry)
    return y[0] if alone else y


def _weights(module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """The weight of the forward pass, all of it, and the support of the backward pass."""
    held = module.parametrizations.weight
    return module.weight, held.original.detach(), held[0].back


def _cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast would do: a Function of our own is not on its list."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    kind = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(kind) for t in tensors)
