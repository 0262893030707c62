"""Cut: values on a support, exact zeros off it, at the pace of memory.

On the CPU torch's `where` and `masked_fill_` go entry by entry. There the bits of a value are joined with all ones or
all zeros by AND, three times faster: what is off the support becomes +0, be it NaN or infinite. Whoever has a kernel is
asked first (`ask_first`), for this room knows none.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual
from torch.jit._trace import is_tracing

_WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


class Cutter(Protocol):
    """Writes y from plain tensors of one shape, or says False and leaves it alone.

    Forms: "cut": x where kept, else +0; "fade": x where kept, else factor·x; "clear": x itself, +0 where not kept;
    "add": y + factor·x where kept.
    """

    def __call__(self, form: str, x: Tensor, kept: Tensor, y: Tensor, factor: float = 0.0) -> bool: ...


_asked: list[Cutter] = []


def ask_first(cutter: Cutter) -> None:
    """From now on this may serve, and writes what would have been written without it."""
    if cutter not in _asked:
        _asked.append(cutter)


def cut(w: Tensor, kept: Tensor) -> Tensor:
    """w where `kept`, else 0; so is its gradient, of any order.

    Args:
        w: any shape.
        kept: bool of the same shape, or one that broadcasts.
    """
    if not _has_words(w, kept):
        return torch.where(kept, w, torch.zeros((), dtype=w.dtype, device=w.device))
    if torch.is_grad_enabled() and w.requires_grad:
        return _Cut.apply(w, kept)
    return _joined(w, kept)


def cut_(w: Tensor, kept: Tensor) -> Tensor:
    """The same in place; it does not enter the gradient's tape."""
    with torch.no_grad():
        if not _has_words(w, kept):
            return w.masked_fill_(~kept, 0)
        if not _served("clear", w, kept, w):
            w.view(_WORDS[w.dtype]).bitwise_and_(_bits(kept))
        return w


def faded(w: Tensor, kept: Tensor, fade: Tensor | float) -> Tensor:
    """w where `kept`, else fade·w; on the CPU it has no gradient."""
    if not _has_words(w, kept):
        return torch.where(kept, w, w * fade)
    y = torch.empty_like(w)
    if _served("fade", w, kept, y, float(fade)):
        return y
    word, off = _WORDS[w.dtype], w * fade
    apart = w.view(word) ^ off.view(word)
    return apart.bitwise_and_(_bits(kept)).bitwise_xor_(off.view(word)).view(w.dtype)


def add_where_(y: Tensor, x: Tensor, kept: Tensor, factor: float) -> Tensor:
    """y += factor·x where `kept`; it does not enter the gradient's tape."""
    with torch.no_grad():
        if y.shape == x.shape and _has_words(x, kept) and _has_words(y, kept) and _served("add", x, kept, y, factor):
            return y
        return y.add_(cut(x, kept), alpha=factor)


def learned(w: Tensor, kept: Tensor) -> Tensor:
    """A weight whose zeros are in place already: w itself, its gradient cut."""
    return _Learned.apply(w, kept)


def traced() -> bool:
    """Whether others write operators down or answer for them (compilers, make_fx, fake tensors): they see no kernel."""
    return torch.compiler.is_compiling() or is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def _has_words(w: Tensor, kept: Tensor) -> bool:
    """Whether these are plain tensors in the CPU's memory that nobody traces, for tracers know `where` better."""
    if traced():
        return False
    plain = type(w) in (Tensor, nn.Parameter) and w.device.type == "cpu" and w.dtype in _WORDS
    followed = is_functorch_wrapped_tensor(w) or is_functorch_wrapped_tensor(kept) or unpack_dual(w).tangent is not None
    return plain and kept.shape == w.shape and not followed


def _served(form: str, x: Tensor, kept: Tensor, y: Tensor, factor: float = 0.0) -> bool:
    return any(cutter(form, x, kept, y, factor) for cutter in _asked)


def _bits(kept: Tensor) -> Tensor:
    """−1, all ones, where kept; else 0. A wider integer beside it has its sign stretched over all bits."""
    return kept.view(torch.int8).neg()


def _joined(w: Tensor, kept: Tensor) -> Tensor:
    y = torch.empty_like(w)
    if _served("cut", w, kept, y):
        return y
    return torch.bitwise_and(w.resolve_neg().view(_WORDS[w.dtype]), _bits(kept)).view(w.dtype)


class _Cut(torch.autograd.Function):
    """`cut` both ways; written so that torch.func may see it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, kept: Tensor) -> Tensor:
        return _joined(w, kept)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return cut(grad_outputs[0], *ctx.saved_tensors), None


class _Learned(_Cut):
    """`cut` of what needs no cut: only the way back is left."""

    @staticmethod
    def forward(w: Tensor, kept: Tensor) -> Tensor:
        return w.view_as(w)
