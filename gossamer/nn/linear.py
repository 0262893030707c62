"""PackedLinear: a linear layer whose weight is stored and multiplied in a sparse format.

Shapes: T tokens (any leading axes), M output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.core.errors import FormatError
from gossamer.formats import Format, format_named
from gossamer.kernels.dispatch import Plan, explain
from gossamer.kernels.ops import check_input, forget_plan, plan_for, record, run_over
from gossamer.kernels.reference import activation_named

# A format class, its name, a stored weight, or any function from a dense weight to a stored one.
FormatLike = type[Format] | str | Format | Callable[[Tensor], Format]


class PackedLinear(nn.Module):
    """y = act(x Wᵀ + b), with W stored as a format and run by the kernel that dispatch chose once.

    The format's parts are buffers, so `state_dict`, `.to`, `deepcopy` and `safetensors` work as for any layer;
    the kernel is chosen at the first call and again after the parts were moved, cast or loaded. Plain eager
    inference calls the kernel directly; under `torch.compile`, `torch.export` or with gradients wanted the layer
    is one `gossamer::sparse_linear` operator. The values are a buffer: set `layer.values.requires_grad_()` to
    train them on their support.

    Args:
        fmt: the stored weight [M, K].
        bias: [M], or None.
        activation: applied to the result: "none", "relu", "relu6", "hard_swish", "gelu" (erf), "gelu_tanh" or "silu".
        backend: insist on a backend by name; None takes the first that serves.
        tokens: rows of x expected per call, where known; None for any number.
        transposed: the dense layer stores its weight as [K, M], as `Conv1D` does; `unpack` gives that back.

    Raises:
        FormatError: the bias does not have M entries.
        UnknownName: no such activation or backend.
        DispatchError: at the first call, when the named backend cannot serve; the message says why.

    Example:
        >>> from gossamer.formats import CSR
        >>> layer = PackedLinear.from_linear(nn.Linear(4, 3), CSR)
        >>> layer(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    values: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        fmt: Format,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        backend: str | None = None,
        tokens: int | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (fmt.rows,):
            raise FormatError(f"the bias must have {fmt.rows} entries like the rows, got shape {tuple(bias.shape)}")
        self.out_features, self.in_features = fmt.shape
        self.activation, self.backend, self.tokens = activation_named(activation), backend, tokens
        self.transposed = transposed
        self._record, self._like, self._names = record(fmt), fmt.with_parts(_hollow(fmt)), fmt.PARTS
        for name, part in fmt.parts().items():
            self.register_buffer(name, part)
        self.register_parameter("bias", bias if bias is None else _parameter(bias))
        self._plan: Plan | None = None
        self._seen: int | None = None
        self._of: Tensor | None = None
        # Parts that came from a file are checked before a kernel trusts their indices.
        self._trusted = True

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module | Tensor,
        fmt: FormatLike,
        *,
        backend: str | None = None,
        activation: str = "none",
        tokens: int | None = None,
        support_mask: Tensor | None = None,
    ) -> Self:
        """Pack an `nn.Linear`, a `transformers` `Conv1D` (weight stored [K, M]) or a bare weight [M, K].

        Args:
            linear: the layer or weight; it is not changed.
            fmt: a format class or name with its default options, a stored weight, or a function of the weight,
                such as `functools.partial(RowGrouped.from_dense, g=8)`.
            backend: insist on a backend by name.
            activation: fused after the product.
            tokens: rows of x expected per call, where known.
            support_mask: bool [M, K]; decides which entries are kept, zeros among them too.

        Raises:
            FormatError: not such a layer, or its weight does not fit the format.
        """
        weight, bias, transposed = _weight_of(linear)
        stored = _stored(weight, fmt, support_mask)
        packed = cls(stored, bias, activation=activation, backend=backend, tokens=tokens, transposed=transposed)
        return packed.train(linear.training) if isinstance(linear, nn.Module) else packed

    @property
    def fmt(self) -> Format:
        """The stored weight, over the layer's own buffers."""
        return self._like.with_parts(dict(zip(self._names, self._parts())))

    @property
    def weight(self) -> Tensor:
        """The dense weight [M, K], unpacked afresh at every look."""
        return self.fmt.to_dense()

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept."""
        return self.fmt.density

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight and the bias."""
        return self.fmt.nbytes + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())

    @property
    def plan(self) -> Plan:
        """The kernel that runs this layer; chosen now if it was not yet."""
        values = self._buffers["values"]
        self._plan = plan_for(
            self._parts(), self._record, backend=self.backend or "", tokens=self.tokens, trusted=self._trusted
        )
        self._seen = None if values.is_inference() else values._version
        self._of = values
        return self._plan

    def current_plan(self) -> Plan:
        """The kernel chosen before, or chosen now where there is none or its weights have changed."""
        plan, values = self._plan, self._buffers["values"]
        # An optimizer step writes to the values in place; a kernel may hold a re-ordered copy of the old ones.
        if plan is None or self._of is not values or (self._seen is not None and self._seen != values._version):
            return self.plan
        return plan

    def explain(self) -> str:
        """Say which kernel runs, and why not the others."""
        return explain(self.plan)

    def replan(self) -> None:
        """Forget the chosen kernel; call it after editing a part through `.data`, which autograd does not see."""
        forget_plan(self.values)
        self._plan = None

    def unpack(self) -> nn.Module:
        """The dense layer this was packed from, bit for bit: `nn.Linear`, or `Conv1D` where it came from one.

        Raises:
            FormatError: an activation is fused in; unpack it by hand with `weight` and `bias`.
        """
        if self.activation != "none":
            raise FormatError(f"{self.activation} is fused into this layer, a dense linear layer cannot hold it")
        dense = _conv1d(self) if self.transposed else _linear(self)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.as_operator(x):
            x = _autocast(x, self.values.dtype)
            return torch.ops.gossamer.sparse_linear(
                x, self._parts(), self._record, self.bias, self.activation, self.backend or "", self.tokens
            )
        plan = self.current_plan()
        x = _autocast(x, plan.call.dtype)
        check_input(x, self.in_features, plan.call)
        return run_over(plan, x, self._parameters["bias"], self.activation)

    def _parts(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    def as_operator(self, x: Tensor) -> bool:
        """Whether something other than plain inference looks on: a compiler, a subclass, autograd, meta tensors."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
            return True
        if not torch.is_grad_enabled():
            return False
        bias = self.bias
        return x.requires_grad or self.values.requires_grad or (bias is not None and bias.requires_grad)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._plan = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._plan, self._trusted = None, False

    def __getstate__(self) -> dict[str, Any]:
        # A plan may hold memory that only its library can copy; it is made again on first use.
        return self.__dict__ | {"_plan": None, "_of": None}

    def extra_repr(self) -> str:
        fused = f", activation={self.activation}" if self.activation != "none" else ""
        options = {key: value for key, value in self._like.meta().items() if key not in ("format", "rows", "cols")}
        named = "".join(f", {key}={value}" for key, value in options.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self._like.name}{named}{fused}"
        )


def _hollow(fmt: Format) -> dict[str, Tensor]:
    """Empty stand-ins for the parts: the layer's buffers are the only ones that count."""
    return {name: part.new_empty(0) for name, part in fmt.parts().items()}


def _parameter(bias: Tensor) -> nn.Parameter:
    return nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inside autocast other layers hand over lower precision; take it in the weights' dtype."""
    return x.to(dtype) if x.dtype != dtype and torch.is_autocast_enabled(x.device.type) else x


def _weight_of(linear: nn.Module | Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """The weight as [M, K], the bias, and whether the layer stores its weight transposed."""
    if isinstance(linear, Tensor):
        return linear, None, False
    if isinstance(linear, nn.Linear):
        return linear.weight, linear.bias, False
    # Recognised by its shape, so that transformers need not be imported.
    if type(linear).__name__.endswith("Conv1D") and hasattr(linear, "nf"):
        return linear.weight.t(), linear.bias, True
    raise FormatError(f"PackedLinear packs nn.Linear, Conv1D or a weight [M, K], got {type(linear).__name__}")


def _stored(weight: Tensor, fmt: FormatLike, support_mask: Tensor | None) -> Format:
    if isinstance(fmt, Format):
        if fmt.shape != tuple(weight.shape):
            raise FormatError(f"the stored weight is {fmt.shape}, the layer's {tuple(weight.shape)}")
        return fmt
    build = format_named(fmt).from_dense if isinstance(fmt, str) else getattr(fmt, "from_dense", fmt)
    return build(weight.detach()) if support_mask is None else build(weight.detach(), support_mask)


def _linear(packed: PackedLinear) -> nn.Linear:
    dense = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(packed.weight.detach())
    dense.bias = None if packed.bias is None else _parameter(packed.bias)
    return dense


def _conv1d(packed: PackedLinear) -> nn.Module:
    from gossamer.core.errors import need

    dense = need("transformers.pytorch_utils", "text").Conv1D(packed.out_features, 0)
    dense.nx = packed.in_features
    dense.weight = nn.Parameter(packed.weight.detach().t().contiguous())
    dense.bias = _parameter(packed.bias)
    return dense
