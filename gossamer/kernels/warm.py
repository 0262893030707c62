"""Warming up: kernels compiled, or read from the disk cache, now rather than at the first product that needs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch

from gossamer.core.errors import DispatchError, MissingDependency, unknown
from gossamer.kernels.cpu.stream import GROUPS
from gossamer.kernels.cpu.trial import cannot_compile

if TYPE_CHECKING:
    from gossamer.kernels.cpu.launch import Launch
    from gossamer.kernels.cpu.threads import Entry

# A name for people, and what brings the kernel.
Job = tuple[str, Callable[[], "Entry | Launch"]]
Progress = Callable[[str, int, int], None]
# Bytes of an index, the usual first: weights of up to 65,536 columns have two.
_INDEX_BYTES = (2, 4)
_FLOATS = ((torch.float32, 4), (torch.bfloat16, 2))
# What `pack` fuses into products most often; other kernels take the activation as a number.
_FUSED = ("none", "relu", "gelu")
# Sizes of an image that is wider than a vector, and of one that is narrower.
_IMAGES = (56, 7)
# Into how many runs of pixels a vector of a convolution's output falls apart: lines of whole vectors, others.
_PIECES = (1, 2)


@dataclass(frozen=True)
class Warmed:
    """One kernel that is ready, or why it cannot be.

    Args:
        kind: one of `KINDS`.
        kernel: its name, for people.
        seconds: what it took to be ready.
        from_disk: it had been compiled before, on this machine.
        refused: why this processor cannot run it; None where it can.
    """

    kind: str
    kernel: str
    seconds: float
    from_disk: bool
    refused: str | None = None


def warm_up(*kinds: str, progress: Progress | None = None) -> tuple[Warmed, ...]:
    """Compile kernels, once per machine, so that no first call has to wait for it.

    Args:
        kinds: among `KINDS`: "products" (what `pack` runs), "networks" (what `compile` adds), "images" (its
            convolutions), "bfloat16" (products of panels in that type), "decode", "int4", "training", "spgemm"; all
            when none is named.
        progress: called with (kernel, done, total).

    Returns:
        One record per kernel; those that this processor cannot run say why.

    Raises:
        UnknownName: no such kind; near names are listed.
        MissingDependency: nothing can be compiled here; the reason is given.

    Example:
        >>> all(w.refused is None for w in warm_up("spgemm"))
        True
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of kernel", kind, KINDS)
    if reason := cannot_compile():
        raise MissingDependency(f"no kernel can be warmed up: {reason}; reinstall numba and llvmlite")
    jobs = [(kind, *job) for kind in dict.fromkeys(kinds or KINDS) for job in KINDS[kind]()]
    done = []
    for number, (kind, name, bring) in enumerate(jobs):
        if progress is not None:
            progress(name, number, len(jobs))
        done.append(_ready(kind, name, bring))
    if progress is not None:
        progress("done", len(jobs), len(jobs))
    return tuple(done)


def _ready(kind: str, name: str, bring: Callable[[], Entry | Launch]) -> Warmed:
    began = time.perf_counter()
    try:
        brought = bring()
    except DispatchError as error:
        return Warmed(kind, name, 0.0, False, str(error).partition(";")[0])
    entry: Entry = getattr(brought, "entry", brought)
    return Warmed(kind, name, time.perf_counter() - began, entry.kernel.cache_hits > 0)


def _products() -> Iterator[Job]:
    from gossamer.kernels.cpu.plan import kernel_for

    for index_bytes in _INDEX_BYTES:
        for g in GROUPS:
            yield f"product, groups of {g}, {8 * index_bytes}-bit indices", partial(kernel_for, g, index_bytes)


def _groups() -> Iterator[tuple[int, int, str]]:
    """Rows of a group, whether the rows have another order than their own, and both in words."""
    for g in GROUPS:
        yield g, 0, f"groups of {g}"
        if g > 1:
            yield g, 1, f"groups of {g}, re-ordered"


def _networks() -> Iterator[Job]:
    from gossamer.kernels.cpu import attention_loops, elementwise_loops, sequence, token_loops
    from gossamer.kernels.cpu.elementwise import plan_elementwise
    from gossamer.kernels.cpu.norm import plan_layer_norm, plan_rms_norm
    from gossamer.kernels.cpu.spmm_panels import resident_kernel

    for g, ordered, words in _groups():
        yield f"product of panels, {words}", partial(resident_kernel, g, _INDEX_BYTES[0], ordered)
    yield "rows to panels", token_loops.packing
    yield "panels to rows", token_loops.unpacking
    yield "embedding", token_loops.embedding
    yield "attention", attention_loops.kernel
    yield "rotary embedding", elementwise_loops.rotating
    yield "layer norm", partial(plan_layer_norm, 1, 64, 1e-5)
    yield "RMS norm", partial(plan_rms_norm, 1, 64, 1e-5)
    for form, activation in (("add", "none"), ("multiply", "silu"), ("alone", "gelu")):
        yield f"elementwise {form}, {activation}", partial(plan_elementwise, 1, 64, form=form, activation=activation)
    yield "sequence of kernels", sequence.kernel


def _images() -> Iterator[Job]:
    from gossamer.kernels.cpu import conv_kernel, plane_kernel, runs_kernel
    from gossamer.kernels.cpu.depthwise import plan_depthwise
    from gossamer.kernels.cpu.plane_ops import plan_pool
    from gossamer.kernels.cpu.window import Window

    for g, ordered, words in _groups():
        for pieces, adding in product(_PIECES, (0, 1)):
            name = f"convolution{' and sum' * adding}, {words}, vectors in {pieces}"
            yield name, partial(conv_kernel.kernel, g, pieces, adding, ordered)
    for adding in (0, 1):
        yield f"convolution{' and sum' * adding} by runs of taps", partial(runs_kernel.kernel, adding)
    for size in _IMAGES:
        for taps, step in ((3, 1), (3, 2), (5, 1), (5, 2)):
            one = Window((taps, taps), (step, step), (taps // 2,) * 4)
            name = f"depthwise {taps}x{taps}, stride {step}, {size} pixels wide"
            yield name, partial(plan_depthwise, torch.ones(8, taps, taps), 1, size, size, one)
    yield "pooling", partial(plan_pool, "max", 1, 8, 56, 56, Window((3, 3), (2, 2), (1, 1, 1, 1)))
    yield "mean of planes", plane_kernel.mean_kernel
    yield "copy of planes", plane_kernel.copy_kernel
    yield "planes of channels-last images", plane_kernel.gather_kernel
    yield "sum of planes", plane_kernel.add_kernel


def _decode() -> Iterator[Job]:
    from gossamer.kernels.cpu.decode import kernel_for as rows
    from gossamer.kernels.cpu.tiledecode import kernel_for as tiles

    for dtype, size in _FLOATS:
        for tokens in (1, 2, 4, 8):
            words = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens"
            yield f"tile bitmask product, {words}", partial(tiles, tokens, size)
            yield f"bitmask product, {words}", partial(rows, tokens, size)


def _bfloat16() -> Iterator[Job]:
    from gossamer.formats import CSR, RowGrouped
    from gossamer.kernels.cpu import token_loops
    from gossamer.kernels.cpu.narrow import narrow
    from gossamer.kernels.cpu.narrow_panels import plan_narrow

    ones = torch.ones(8, 8, dtype=torch.bfloat16)
    for g in GROUPS:
        weights = narrow(CSR.from_dense(ones) if g == 1 else RowGrouped.from_dense(ones, g=g))
        laid_out = partial(plan_narrow, weights, panels=1, width=64, threads=1)
        yield f"bfloat16 product of panels, groups of {g}", laid_out
        # A packed layer sums to float32 and rounds once its rows are back.
        for activation in _FUSED:
            name = f"bfloat16 product of a layer, groups of {g}, {activation}"
            yield name, partial(laid_out, out_dtype=torch.float32, activation=activation)
    yield "rows to panels", token_loops.packing
    yield "panels to rows", token_loops.unpacking


def _int4() -> Iterator[Job]:
    from gossamer.kernels.cpu.int4decode import kernel_for

    for tokens in (1, 2, 4):
        for whole in (False, True):
            name = f"4-bit product, {tokens} tokens, {'every' if whole else 'some'} groups kept"
            yield name, partial(kernel_for, tokens, whole)


def _training() -> Iterator[Job]:
    from gossamer.kernels.cpu import sampled
    from gossamer.kernels.cpu.cutting import FORMS, plan_cut
    from gossamer.kernels.cpu.few import plan_best_of_few

    for g in GROUPS:
        yield f"sampled product, groups of {g}", partial(sampled.kernel, g, _INDEX_BYTES[0])
    for form in FORMS:
        yield f"values on a support, {form}", partial(plan_cut, 1, form)
    for kept, size, side in product((2,), (4, 8), (1, 9)):
        yield (
            f"{kept}:{size} ranking, {side} side by side",
            partial(plan_best_of_few, 1, size, side, kept, absolute=True),
        )


def _spgemm() -> Iterator[Job]:
    from gossamer.kernels.cpu.spgemm import PRODUCTS, kernel_for, survey_kernel

    yield "survey of sparse factors", survey_kernel
    for size in (4, 8):
        for making, name in PRODUCTS.items():
            yield f"sparse x sparse {name}, {8 * size}-bit values", partial(kernel_for, size, making)


KINDS: dict[str, Callable[[], Iterator[Job]]] = {
    "products": _products,
    "networks": _networks,
    "images": _images,
    "bfloat16": _bfloat16,
    "decode": _decode,
    "int4": _int4,
    "training": _training,
    "spgemm": _spgemm,
}
