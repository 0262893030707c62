"""Bad input to every public kernel function: an error of ours that says what, got and how to fix, or the right answer.

Every tensor that a function takes is spoilt in every way, one at a time; `out` is laid over every input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from gossamer.core.errors import FormatError, GossamerError
from gossamer.formats import CSR, Bitmask, Int4Groups, RowGrouped, TileBitmask
from gossamer.kernels.cpu import decode
from gossamer.kernels.cpu.attention import attention, plan_attention
from gossamer.kernels.cpu.conv import plan_conv, sparse_conv
from gossamer.kernels.cpu.depthwise import depthwise, plan_depthwise
from gossamer.kernels.cpu.elementwise import elementwise, plan_elementwise, plan_rotary, rotary
from gossamer.kernels.cpu.embed import embed, plan_embed
from gossamer.kernels.cpu.int4decode import Int4Product
from gossamer.kernels.cpu.narrow import narrow
from gossamer.kernels.cpu.norm import layer_norm, plan_layer_norm, rms_norm
from gossamer.kernels.cpu.plane_ops import from_planes, plan_pool, pool, to_planes
from gossamer.kernels.cpu.sddmm import sampled_product
from gossamer.kernels.cpu.spmm import spmm, spmm_columns
from gossamer.kernels.cpu.spmm_panels import aligned_panels, plan_panels, spmm_panels
from gossamer.kernels.cpu.stream import stream
from gossamer.kernels.cpu.target import supports
from gossamer.kernels.cpu.tiledecode import TileProduct
from gossamer.kernels.cpu.tokens import panels_to_rows, rows_to_panels
from gossamer.kernels.cpu.window import Window
from gossamer.kernels.lowering import lower
from gossamer.kernels.spgemm import spgemm
from gossamer.nn import PackedConv2d, PackedLinear, SparseLinear

S = 16  # rows and columns of the weight, features, heads' width: all alike, so that `out` may stand on any input


def matrix(rows=S, cols=S):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, cols, generator=generator)
    return torch.where(torch.rand(rows, cols, generator=generator) < 0.4, dense, 0.0)


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def panels(count=2, features=S, width=64):
    return aligned_panels(count, features, width).copy_(randn(count, features, width))


W = matrix()
STREAM = lower(CSR.from_dense(W))
WINDOW = Window((3, 3), padding=(1, 1, 1, 1))
BITS = Bitmask.from_dense(W)


@dataclass(frozen=True)
class Subject:
    """A function, arguments that it takes, and whether it takes `out`.

    Args:
        over: inputs that `out` may be itself.
    """

    call: Callable
    args: dict
    out: bool = False
    over: tuple = ()
    close: dict = field(default_factory=lambda: {"rtol": 1e-4, "atol": 1e-4})


def decode_rows(**parts):
    return decode.bitmask_matvec(rows=S, cols=S, **parts)


def conv(weights, **kwargs):
    return sparse_conv(weights=weights, window=WINDOW, **kwargs)


CONV = lower(CSR.from_dense(matrix(S, 9 * S)))
SUBJECTS = {
    "spmm": Subject(spmm, {"stream": STREAM, "x_TK": randn(S, S), "bias_M": randn(S)}, out=True),
    "spmm_columns": Subject(spmm_columns, {"stream": STREAM, "x_KN": randn(S, S), "bias_M": randn(S)}, out=True),
    "spmm_panels": Subject(
        spmm_panels,
        {"stream": STREAM, "x_PKW": panels(), "bias_M": randn(S), "residual_PMW": panels()},
        out=True,
        over=("residual_PMW",),
    ),
    "bfloat16 panels": Subject(
        spmm_panels,
        {"stream": narrow(CSR.from_dense(W.bfloat16())), "x_PKW": randn(2, S, 64).bfloat16(), "bias_M": randn(S)},
        out=True,
    ),
    "sparse_conv": Subject(
        conv,
        {"weights": CONV, "x_NCHW": randn(2, S, 8, 8), "bias_M": randn(S), "residual": randn(2, S, 8, 8)},
        out=True,
        over=("residual",),
    ),
    "depthwise": Subject(
        lambda **kwargs: depthwise(window=WINDOW, **kwargs),
        {"weight_CHW": randn(S, 3, 3), "x_NCHW": randn(2, S, 8, 8), "bias_C": randn(S), "residual": randn(2, S, 8, 8)},
        out=True,
    ),
    "pool": Subject(lambda **kwargs: pool("max", window=WINDOW, **kwargs), {"x_NCHW": randn(2, S, 8, 8)}, out=True),
    "to_planes": Subject(to_planes, {"x_NCHW": randn(2, S, 8, 8)}),
    "from_planes": Subject(lambda planes: from_planes(planes, 8, 8), {"planes": to_planes(randn(2, S, 8, 8))}),
    "layer_norm": Subject(
        layer_norm,
        {"x_PKW": panels(), "gamma_K": randn(S), "beta_K": randn(S), "residual_PKW": panels()},
        out=True,
        over=("x_PKW", "residual_PKW"),
    ),
    "rms_norm": Subject(rms_norm, {"x_PKW": panels(), "gamma_K": randn(S)}, out=True, over=("x_PKW",)),
    "elementwise": Subject(
        lambda **kwargs: elementwise(form="add", **kwargs),
        {"x_PKW": panels(), "z_PKW": panels()},
        out=True,
        over=("x_PKW", "z_PKW"),
    ),
    "rotary": Subject(
        lambda **kwargs: rotary(batch=2, heads=2, **kwargs),
        {"x_PKW": panels(), "cos_SD": randn(64, 4), "sin_SD": randn(64, 4)},
        out=True,
        over=("x_PKW",),
    ),
    "attention": Subject(
        lambda **kwargs: attention(batch=2, seq=64, heads=2, **kwargs),
        {"q_PKW": panels(), "k_PKW": panels(), "v_PKW": panels(), "mask_BS": randn(2, 64)},
    ),
    "embed": Subject(
        lambda ids, table, places: embed((ids, table), (None, places)),
        {"ids": torch.arange(128).view(2, 64) % 7, "table": randn(7, S), "places": randn(64, S)},
    ),
    "rows_to_panels": Subject(rows_to_panels, {"x_BSK": randn(2, 64, S)}),
    "panels_to_rows": Subject(lambda x_PKW: panels_to_rows(x_PKW, 2, 64), {"x_PKW": panels()}),
    "sampled_product": Subject(sampled_product, {"stream": STREAM, "y": randn(64, S), "x": randn(64, S)}),
    "stream": Subject(
        lambda indptr, indices, values: spmm(stream(1, S, S, indptr, indices, values), torch.eye(S)),
        {"indptr": CSR.from_dense(W).indptr, "indices": CSR.from_dense(W).indices, "values": CSR.from_dense(W).values},
    ),
    "spgemm": Subject(
        lambda **parts: spgemm(CSR(S, S, **parts), CSR.from_dense(W)).to_dense(), CSR.from_dense(W).parts()
    ),
    "SparseLinear": Subject(
        lambda x: _trained()(x).detach(),
        {"x": randn(4, S)},
    ),
    "PackedLinear": Subject(
        lambda x, bias: PackedLinear(CSR.from_dense(W), bias)(x).detach(),
        {"x": randn(4, S), "bias": randn(S)},
    ),
    "PackedConv2d": Subject(lambda x: _packed_conv()(x).detach(), {"x": randn(2, S, 8, 8)}),
}
if supports("bitmask_float32") is None:
    SUBJECTS["bitmask_matvec"] = Subject(decode_rows, {**BITS.parts(), "x_TK": randn(3, S), "bias_M": randn(S)})
    SUBJECTS["TileProduct"] = Subject(
        lambda x, bias: TileProduct.of(TileBitmask.from_dense(W))(x, bias), {"x": randn(3, S), "bias": randn(S)}
    )
if supports("int4groups") is None:
    SUBJECTS["Int4Product"] = Subject(
        lambda x, bias: Int4Product.of(Int4Groups.from_dense(W))(x, bias), {"x": randn(3, S), "bias": randn(S)}
    )


def _trained():
    torch.manual_seed(0)
    layer = SparseLinear.from_support(W != 0)
    with torch.no_grad():
        layer.values.copy_(CSR.from_dense(W).values)
    return layer


def _packed_conv():
    torch.manual_seed(0)
    return PackedConv2d.from_conv(nn.Conv2d(S, S, 3, padding=1), "csr")


def spread(x: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([x, x], -1)[..., 0]


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: x.double(),
    "int8": lambda x: x.to(torch.int8),
    "complex": lambda x: x.to(torch.complex64),
    "not contiguous": spread,
    "on meta": lambda x: x.to("meta"),
    "one axis more": lambda x: x[None, ..., None],
    "a scalar": lambda x: x.flatten()[0],
    "flat": lambda x: x.flatten()[:-1],
    "one longer": lambda x: torch.cat([x, x[..., -1:]], -1),
    "one shorter": lambda x: x[..., :-1].contiguous(),
    "empty": lambda x: x[..., :0].contiguous(),
    "sparse layout": lambda x: x.to_sparse(),
}
TENSORS = [(name, arg) for name, s in SUBJECTS.items() for arg, value in s.args.items() if isinstance(value, Tensor)]
# These hold the same numbers, and may be taken.
SAME_NUMBERS = ("not contiguous", "float64")
# Another size is another valid call of these.
FREE = {
    ("spmm", "x_TK"), ("sparse_conv", "x_NCHW"), ("spmm_columns", "x_KN"), ("to_planes", "x_NCHW"), ("pool", "x_NCHW"),
    ("rows_to_panels", "x_BSK"), ("embed", "places"), ("PackedConv2d", "x"),
}  # fmt: skip
# Layers say on meta what shape will come out.
LAYERS = ("SparseLinear", "PackedLinear", "PackedConv2d")
OTHER_CALLS = {
    ("spgemm", "values", "int8"),
    ("embed", "ids", "one shorter"),
    ("embed", "ids", "empty"),
    ("bfloat16 panels", "x_PKW", "empty"),
}
SIZES = ("one longer", "one shorter", "empty", "one axis more")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "arg"), TENSORS, ids=lambda x: str(x))
def test_spoilt_tensors_are_refused_or_do_no_harm(name, arg, fault):
    subject = SUBJECTS[name]
    try:
        spoilt = FAULTS[fault](subject.args[arg])
    except NotImplementedError as error:
        pytest.skip(f"torch has no such tensor: {error}")
    try:
        got = subject.call(**subject.args | {arg: spoilt})
    except Exception as error:
        assert isinstance(error, GossamerError) and len(str(error)) > 25, f"{type(error).__name__}: {error}"
        return
    if got.is_meta:
        assert fault == "on meta" and name in LAYERS
    elif fault in SAME_NUMBERS or spoilt.tolist() == subject.args[arg].tolist():
        want = subject.call(**subject.args)
        torch.testing.assert_close(got.to(want.dtype), want, **subject.close)
    else:
        free = (name, arg) in FREE and fault in SIZES
        assert free or (name, arg, fault) in OTHER_CALLS, f"{name} took {arg} {fault} and gave {tuple(got.shape)}"


OVER = [
    (n, a) for n, s in SUBJECTS.items() if s.out for a, v in s.args.items() if isinstance(v, Tensor) and v.dim() > 1
]


@pytest.mark.parametrize("place", ["itself", "in part"])
@pytest.mark.parametrize(("name", "arg"), OVER, ids=lambda x: str(x))
def test_out_over_an_input_is_refused_or_right(name, arg, place):
    subject = SUBJECTS[name]
    want = subject.call(**subject.args)
    size, shift = want.numel(), 0 if place == "itself" else 16
    given = subject.args[arg]
    memory = aligned_panels(1, 1, size + 16).view(-1).to(given.dtype)
    if given.numel() != size:
        pytest.skip(f"{arg} is smaller than out")
    over = memory[:size].view(given.shape).copy_(given)
    out = memory[shift : size + shift].view(want.shape)
    try:
        subject.call(**subject.args | {arg: over, "out": out})
    except FormatError as error:
        assert "overlap" in str(error) and not (arg in subject.over and place == "itself"), error
        assert torch.equal(over, given), "it was written before it was refused"
        return
    torch.testing.assert_close(out, want, **subject.close)
    assert arg in subject.over and place == "itself"


NOTHING = [(0, 5, 3), (5, 0, 3), (5, 6, 0), (0, 0, 0), (16, 16, 0)]
STORED = {
    "csr": CSR.from_dense,
    "rowgrouped": RowGrouped.from_dense,
    "bitmask": Bitmask.from_dense,
    "tilebitmask": TileBitmask.from_dense,
}


@pytest.mark.parametrize("make", STORED.values(), ids=STORED)
@pytest.mark.parametrize("sizes", NOTHING, ids=str)
def test_nothing_times_nothing_has_the_right_shape(make, sizes):
    rows, cols, tokens = sizes
    layer = PackedLinear(make(torch.ones(rows, cols)), torch.ones(rows))
    torch.testing.assert_close(layer(torch.ones(tokens, cols)).detach(), torch.full((tokens, rows), 1.0 + cols))
    product = spgemm(CSR.from_dense(torch.ones(rows, cols)), CSR.from_dense(torch.ones(cols, tokens))).to_dense()
    torch.testing.assert_close(product, torch.full((rows, tokens), float(cols)))


@pytest.mark.parametrize("sizes", NOTHING, ids=str)
def test_a_layer_of_nothing_trains(sizes):
    rows, cols, tokens = sizes
    layer = SparseLinear(cols, rows, density=0.5)
    x = torch.ones(tokens, cols, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (tokens, rows) and x.grad.shape == x.shape and layer.values.grad.shape == layer.values.shape


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_not_finite_are_refused(number):
    stored = Int4Groups.from_dense(matrix(32, 128))
    with pytest.raises(FormatError, match="finite"):
        Int4Groups.from_dense(matrix().index_fill(0, torch.tensor(3), number))
    for column in (0, 1):
        values = stored.values.clone()
        values[1, column] = number
        with pytest.raises(FormatError, match="finite"):
            Int4Groups.from_parts(stored.parts() | {"values": values}, stored.meta())
        with pytest.raises(FormatError, match="finite"):
            Int4Product.of(stored.with_parts(stored.parts() | {"values": values}))


WRONG_SIZES = {
    "panels below 0": lambda: plan_panels(STREAM, panels=-1, width=64, threads=1),
    "a width of 24": lambda: plan_panels(STREAM, panels=1, width=24, threads=1),
    "used beyond the width": lambda: plan_panels(STREAM, panels=1, width=64, used=65, threads=1),
    "another activation": lambda: plan_panels(STREAM, panels=1, width=64, activation="rulu", threads=1),
    "a window that does not fit": lambda: plan_conv(CONV, 1, 1, 1, Window((3, 3))),
    "images below 0": lambda: plan_conv(CONV, -1, 8, 8, WINDOW),
    "groups that do not divide": lambda: plan_conv(CONV, 1, 8, 8, WINDOW, groups=3),
    "depthwise images below 0": lambda: plan_depthwise(randn(S, 3, 3), -1, 8, 8, WINDOW),
    "a stride of 0": lambda: Window((3, 3), stride=(0, 1)),
    "pooling padding": lambda: plan_pool("max", 1, 4, 8, 8, Window((2, 2), padding=(2, 2, 2, 2))),
    "pooling kind": lambda: pool("most", randn(1, 2, 8, 8), WINDOW),
    "heads of 0": lambda: plan_attention(1, 8, 0, 16),
    "a sequence below 0": lambda: plan_attention(1, -8, 2, 16),
    "heads that do not divide": lambda: plan_attention(1, 8, 3, 16, kv_heads=2),
    "an odd head": lambda: plan_rotary(1, 8, 1, 15),
    "eps that is not finite": lambda: plan_layer_norm(1, 16, float("nan")),
    "a form": lambda: plan_elementwise(1, 16, form="adds"),
    "features beyond the panel": lambda: plan_elementwise(1, 16, within=(8, 16, 16)),
    "too many tables": lambda: plan_embed(1, 8, 16, rows=(4, 4, 4, 4)),
    "ids outside the table": lambda: embed((torch.full((1, 4), 9), randn(7, S))),
    "inner sizes": lambda: spgemm(CSR.from_dense(W), CSR.from_dense(matrix(5, 7))),
    "a dense factor": lambda: spgemm(W, W),
    "a mask's shape": lambda: spgemm(CSR.from_dense(W), CSR.from_dense(W), mask=CSR.from_dense(matrix(3, 3))),
    "an accumulator": lambda: spgemm(CSR.from_dense(W), CSR.from_dense(W), accumulators="hashes"),
    "a density": lambda: SparseLinear(8, 8, density=1.5),
    "a support's shape": lambda: SparseLinear(8, 8, support=torch.ones(4, 4, dtype=torch.bool)),
    "a bias's size": lambda: PackedLinear(CSR.from_dense(W), randn(3)),
    "groups of 3 rows": lambda: stream(3, 6, 6, torch.zeros(3), torch.zeros(0), torch.zeros(0, 3)),
    "rows below 0": lambda: stream(1, -1, 6, torch.zeros(0).int(), torch.zeros(0).int(), torch.zeros(0, 1)),
}


@pytest.mark.parametrize("call", WRONG_SIZES.values(), ids=WRONG_SIZES)
def test_wrong_sizes_and_names_are_refused_in_words(call):
    with pytest.raises(GossamerError) as caught:
        call()
    assert len(str(caught.value)) > 25
