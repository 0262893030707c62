"""Laws of storage: lossless round trips, exact bytes, adjoint reads, and refusal of damaged parts."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.errors import FormatError, UnknownName
from gossamer.formats import (
    CSR,
    FORMATS,
    NM,
    Bitmask,
    Block,
    Dense,
    RowGrouped,
    TileBitmask,
    bitmask,
    format_from,
    nm,
    tilebitmask,
)
from gossamer.formats.checks import BITS_OF

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BUILDS = {
    "dense": Dense.from_dense,
    "csr": CSR.from_dense,
    "bitmask": Bitmask.from_dense,
    "tilebitmask": TileBitmask.from_dense,
    "nm24": partial(NM.from_dense, n=2, m=4),
    "nm12": partial(NM.from_dense, n=1, m=2),
    "nm3of16": partial(NM.from_dense, n=3, m=16),
    "nm4of32": partial(NM.from_dense, n=4, m=32),
    "rows1": partial(RowGrouped.from_dense, g=1),
    "rows4": RowGrouped.from_dense,
    "rows8": partial(RowGrouped.from_dense, g=8),
    "block4x8": Block.from_dense,
    "block2x3": partial(Block.from_dense, a=2, b=3),
}
NM_SIZES = {"nm24": (2, 4), "nm12": (1, 2), "nm3of16": (3, 16), "nm4of32": (4, 32)}


def bits(tensor):
    return tensor.contiguous().view(BITS_OF[tensor.dtype])


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def example(name, rows, cols, density, dtype=torch.float32, seed=0):
    """A matrix that the format can hold, with -0.0, NaN and infinity among its kept entries."""
    rng = torch.Generator().manual_seed(seed)
    cols = cols - cols % NM_SIZES[name][1] if name in NM_SIZES else cols
    w = torch.randn(rows, cols, generator=rng)
    w[torch.rand(rows, cols, generator=rng) < 0.1] = -0.0
    w[torch.rand(rows, cols, generator=rng) < 0.03] = torch.nan
    w[torch.rand(rows, cols, generator=rng) < 0.03] = torch.inf
    mask = torch.rand(rows, cols, generator=rng) < density
    if name in NM_SIZES:
        n, m = NM_SIZES[name]
        rank = torch.rand(rows, cols // m, m, generator=rng).argsort(-1).argsort(-1)
        mask &= (rank < n).view(rows, cols)
    return torch.where(mask, w, torch.zeros(())).to(dtype), mask


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 19),
    cols=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", BUILDS)
def test_round_trip_and_parts(name, rows, cols, density, dtype, seed):
    w, _ = example(name, rows, cols, density, dtype, seed)
    stored = BUILDS[name](w)
    assert same_bits(stored.to_dense(), w)
    again = format_from(json.loads(json.dumps(stored.meta())), stored.parts())
    assert type(again) is type(stored) and again.shape == w.shape
    assert all(torch.equal(part, again.parts()[key]) for key, part in stored.parts().items() if key != "values")
    assert same_bits(again.to_dense(), w)


@pytest.mark.parametrize("name", BUILDS)
def test_counts(name):
    w, _ = example(name, 21, 64, 0.4)
    stored = BUILDS[name](w)
    assert stored.nbytes == sum(part.nbytes for part in stored.parts().values())
    assert stored.nnz == int((bits(w) != 0).sum()) <= stored.stored
    assert stored.density == pytest.approx(stored.nnz / w.numel())
    assert stored.dtype == w.dtype and stored.device == w.device


def test_bytes_by_hand():
    w, _ = example("csr", 16, 64, 0.5)
    kept = int((bits(w) != 0).sum())
    assert CSR.from_dense(w).nbytes == 4 * 17 + 6 * kept
    assert Bitmask.from_dense(w).nbytes == 8 * 16 + 4 * 17 + 4 * (kept + 16)
    assert TileBitmask.from_dense(w).nbytes == 4 * 32 + 4 * 2 + 4 * (kept + 32)
    assert Dense.from_dense(w).nbytes == 4 * 16 * 64
    assert NM.from_dense(torch.zeros(16, 64), n=2, m=4).nbytes == 4 * 16 * 32 + 16 * 32 * 2 // 8
    assert RowGrouped.from_dense(torch.ones(16, 64), g=4).nbytes == 4 * 5 + 4 * 64 * (2 + 16)
    assert Block.from_dense(torch.ones(16, 64), a=4, b=8).nbytes == 4 * 5 + 32 * (2 + 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILDS)
def test_gather_is_the_adjoint_of_to_dense(name, dtype):
    w, _ = example(name, 13, 64, 0.4, dtype)
    stored = BUILDS[name](torch.nan_to_num(w, 1.0, 1.0, 1.0))
    probe = torch.randint(-4, 5, w.shape).to(dtype)
    left = (stored.to_dense().double() * probe.double()).sum()
    right = (stored.values.double() * stored.gather(probe).double()).sum()
    assert stored.gather(probe).shape == stored.values.shape
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", BUILDS)
def test_strided_and_parameter_inputs(name):
    w, _ = example(name, 12, 64, 0.4)
    assert same_bits(BUILDS[name](w.t().contiguous().t()).to_dense(), w)
    wide = torch.zeros(12, 128)
    wide[:, ::2] = w
    assert same_bits(BUILDS[name](wide[:, ::2]).to_dense(), w)
    stored = BUILDS[name](torch.nn.Parameter(w))
    assert not stored.values.requires_grad and same_bits(stored.to_dense(), w)


@pytest.mark.parametrize("name", BUILDS)
def test_support_mask_decides(name):
    w, mask = example(name, 12, 64, 0.4)
    w[mask.nonzero()[0].tolist()[0], mask.nonzero()[0].tolist()[1]] = 0.0
    noisy = torch.where(mask, w, torch.full_like(w, torch.nan))
    stored = BUILDS[name](noisy, mask)
    assert same_bits(stored.to_dense(), torch.where(mask, w, torch.zeros(())))
    if name in ("csr", "bitmask", "tilebitmask"):
        assert stored.nnz == int(mask.sum()), "kept zeros stay as entries"


def test_source_is_not_shared():
    w = torch.ones(4, 8)
    stored = [build(w) for name, build in BUILDS.items() if name not in NM_SIZES]
    w.zero_()
    assert all(bool((each.to_dense() == 1).all()) for each in stored)


def test_index_width():
    assert CSR.from_dense(torch.ones(1, 65536)).indices.dtype == torch.uint16
    wide = CSR.from_dense(torch.ones(1, 65537))
    assert wide.indices.dtype == torch.int32 and int(wide.indices[-1]) == 65536


def test_layouts_of_the_contract():
    w = torch.zeros(3, 18)
    w[0, 0], w[0, 17], w[2, 9] = 1.0, 2.0, 3.0
    stored = Bitmask.from_dense(w)
    assert stored.bits.tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [0, 2, 0, 0]]
    assert stored.offsets.tolist() == [0, 2, 2, 3] and stored.values.numel() == 3 + 16
    pairs = TileBitmask.from_dense(torch.cat([w, torch.zeros(14, 18), w[:1]]))
    assert pairs.bits[0].tolist() == [1, 0, 0, 0, 1 << 5, 0, 0, 0, 2] and pairs.bits[1].tolist()[:2] == [1 << 2, 0]
    assert pairs.starts.tolist() == [0, 3, 5] and pairs.values.tolist() == [1.0, 3.0, 2.0, 1.0, 2.0] + 32 * [0.0]
    tiles = Block.from_dense(torch.arange(1.0, 7.0).view(2, 3), a=2, b=2)
    assert tiles.values.tolist() == [[[1.0, 4.0], [2.0, 5.0]], [[3.0, 6.0], [0.0, 0.0]]]
    groups = RowGrouped.from_dense(torch.tensor([[1.0, 0], [2, 0], [0, 3]]), g=2)
    assert groups.indptr.tolist() == [0, 1, 2] and groups.values.tolist() == [[1.0, 2.0], [3.0, 0.0]]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: CSR.from_dense(torch.ones(3)), "2-D"),
        (lambda: CSR.from_dense(torch.ones(3, 3, dtype=torch.int32)), "cast"),
        (lambda: CSR.from_dense(torch.ones(3, 3, device="meta")), "meta"),
        (lambda: CSR.from_dense(torch.ones(3, 3), torch.ones(3, 2, dtype=torch.bool)), "support mask"),
        (lambda: NM.from_dense(torch.zeros(2, 6)), "pad the weight and its input to 8 columns"),
        (lambda: NM.from_dense(torch.ones(2, 8)), "4 of 4 groups keep more than n=2"),
        (lambda: NM.from_dense(torch.zeros(2, 8), n=5, m=4), "1 <= n <= m"),
        (lambda: RowGrouped.from_dense(torch.ones(2, 8), g=0), "g=0"),
        (lambda: Block.from_dense(torch.ones(2, 8), a=0), "a=0"),
    ],
)
def test_refusals_say_why(build, words):
    with pytest.raises(FormatError, match=words):
        build()


def test_unknown_format_lists_near_names():
    with pytest.raises(UnknownName, match="bitmask"):
        format_from({"format": "bitmsk"}, {})
    assert set(FORMATS) == {
        "dense",
        "csr",
        "bitmask",
        "nm",
        "rowgrouped",
        "block",
        "tilebitmask",
        "int4groups",
        "kernelpatterns",
    }


def _swap(index, value):
    def change(part):
        part = part.clone()
        part[index] = value
        return part

    return change


DAMAGES = [
    ("csr", "indptr", _swap(0, 1)),
    ("csr", "indptr", _swap(2, 10**6)),
    ("csr", "indptr", lambda part: part.long()),
    ("csr", "indices", _swap(0, 60000)),
    ("csr", "indices", lambda part: part.int().flip(0).to(part.dtype)),
    ("csr", "indices", lambda part: part[:-1]),
    ("csr", "values", lambda part: part[:-1]),
    ("csr", "values", lambda part: part.int()),
    ("bitmask", "bits", lambda part: part ^ 1),
    ("bitmask", "bits", lambda part: part[:, :-1]),
    ("bitmask", "offsets", _swap(1, 10**6)),
    ("bitmask", "values", lambda part: part[:-1]),
    ("bitmask", "values", _swap(-1, 1.0)),
    ("tilebitmask", "bits", lambda part: part ^ 1),
    ("tilebitmask", "bits", lambda part: part[:, :-1]),
    ("tilebitmask", "bits", _swap((0, -1), -1)),
    ("tilebitmask", "starts", _swap(1, 10**6)),
    ("tilebitmask", "values", lambda part: part[:-1]),
    ("tilebitmask", "values", _swap(-1, 1.0)),
    ("nm24", "positions", lambda part: part * 0),
    ("nm24", "positions", lambda part: part[:, :-1]),
    ("nm24", "values", lambda part: part[:, :-1]),
    ("rows4", "indptr", _swap(1, 10**6)),
    ("rows4", "indices", _swap(0, 60000)),
    ("rows4", "values", _swap((-1, 3), 5.0)),
    ("rows4", "values", lambda part: part.t().contiguous()),
    ("block2x3", "indices", _swap(0, 60000)),
    ("block2x3", "values", _swap((-1, 0, 1), 5.0)),
    ("dense", "values", lambda part: part[:-1]),
]


@pytest.mark.parametrize(("name", "part", "change"), DAMAGES)
def test_damaged_parts_are_refused(name, part, change):
    stored = BUILDS[name](torch.nan_to_num(example(name, 13, 63, 0.4)[0], 1.0, 1.0, 1.0))
    parts = stored.parts()
    format_from(stored.meta(), parts)
    with pytest.raises(FormatError):
        format_from(stored.meta(), parts | {part: change(parts[part])})


@pytest.mark.parametrize("name", BUILDS)
def test_damaged_records_are_refused(name):
    stored = BUILDS[name](example(name, 13, 64, 0.4)[0])
    for key, value in (("rows", 33), ("cols", -1), ("cols", "64"), ("rows", None)):
        with pytest.raises(FormatError):
            format_from(stored.meta() | {key: value}, stored.parts())
    with pytest.raises(FormatError):
        format_from(stored.meta(), dict(list(stored.parts().items())[1:]))
    with pytest.raises(FormatError):
        format_from(stored.meta(), stored.parts() | {"more": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "module", "function", "fault"),
    [
        ("bitmask", bitmask, "pack_bits", lambda real: lambda mask: real(mask.flip(1))),
        ("tilebitmask", tilebitmask, "_words", lambda real: lambda mask: real(mask.flip(2))),
        ("nm24", nm, "pack_positions", lambda real: lambda at, bits: real(3 - at, bits)),
        ("nm24", nm, "fill_groups", lambda real: lambda mask, n: real(torch.zeros_like(mask), n)),
    ],
)
def test_the_round_trip_law_kills_planted_faults(monkeypatch, name, module, function, fault):
    w, _ = example(name, 8, 64, 0.5)
    monkeypatch.setattr(module, function, fault(getattr(module, function)))
    assert not same_bits(BUILDS[name](w).to_dense(), w)


def test_safetensors_hold_the_parts(tmp_path):
    from safetensors.torch import load_file, save_file

    for name in BUILDS:
        stored = BUILDS[name](example(name, 13, 64, 0.4)[0])
        save_file(stored.parts(), tmp_path / "w.safetensors")
        assert same_bits(
            format_from(stored.meta(), load_file(tmp_path / "w.safetensors")).to_dense(), stored.to_dense()
        )
